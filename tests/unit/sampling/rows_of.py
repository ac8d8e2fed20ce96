"""Sampling rows without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from morph_runtime.engine.messages import SamplingParams
from morph_runtime.sampling.draw import GeneratorDrawer
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.sampler import Sampler


@dataclass
class Tokens:
    tokens: list[int] = field(default_factory=list)
    prompt_len: int = 0


def row(params: SamplingParams, output: Sequence[int] = (), prompt: Sequence[int] = ()) -> SamplingRow:
    return SamplingRow(params, Tokens([*prompt, *output], len(prompt)))


def sampler(eos: tuple[int, ...] = (0,)) -> Sampler:
    device = torch.device("cpu")
    return Sampler(eos, device, draw=GeneratorDrawer(device, torch.initial_seed()))
