"""Streams that saw level shifts, preemptions or several engines, computed again by a slow reference, token by token.

The server says at which level it computed what (`level_history`), which tokens it chose and how likely each was
(`logprobs`). The reference (`tests/oracle.py`) computes the same positions at the same levels. A log probability must
be the same within `NEAR_TIE`; the token must be the one that the reference chooses, or one that it would choose if its
score were higher by less than `NEAR_TIE`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.histories import CACHED, Run
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.sampling.draw import Drawer, GeneratorDrawer
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.sampler import Sampler
from morph_runtime.text.parameters import ParameterLimits, parse_sampling_parameters
from morph_runtime.text.tokenizer import Tokenizer
from tests.oracle import Oracle, oracle_for

NEAR_TIE = 1e-3
"""Log probabilities that are closer than this are taken for equal: the batch's shape decides the rounding (float32)."""
BORDER = 1e-3
"""By which the share that `top_p` keeps may be off for the same reason."""


@dataclass(frozen=True)
class Told:
    """What a server has said of one stream: the tokens it chose, their log probabilities and levels, and what was
    computed when."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


@dataclass
class Replayed:
    """What came of it: tokens compared, near ties among them, and what is wrong; empty if nothing is."""

    compared: int = 0
    ties: int = 0
    wrong: str = ""


@dataclass
class Text:
    """What the sampler sees of a request."""

    tokens: list[int]
    prompt_len: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)


class Replayer:
    """Replays streams of one model in float32 whose prefix cache reuses `exact` levels only."""

    def __init__(
        self,
        oracle: Oracle,
        tokenizer: Tokenizer,
        eos: Sequence[int],
        limits: ParameterLimits,
        device: str = "cpu",
    ) -> None:
        """`oracle` knows the rungs of each level; tokens are drawn on `device`: each type has draws of its own."""
        self._oracle = oracle
        self._tokenizer = tokenizer
        self._limits = limits
        self._device = torch.device(device)
        self._sampler = Sampler(eos, self._device, draw=_drawer(device))
        self._known: dict[str, Replayed] = {}

    @classmethod
    def of_model(cls, folder: Path, device: str) -> Replayer:
        """For a model folder; its layers are quantized as an engine on such a device does it."""
        settings = {
            "model": {"path": str(folder), "dtype": "float32"}, "device": device, "memory": {"kv_tokens": 1024},
            "morph": {"mode": "off", "costs": "off"},
        }  # fmt: skip
        engine = build_engine(EngineConfig.from_mapping(settings))
        try:
            oracle = oracle_for(engine, folder)
            spec = engine.parts.spec
            limits = ParameterLimits(max_tokens=engine.parts.max_model_len, max_outputs=1, vocab_size=spec.vocab)
            return cls(oracle, Tokenizer.from_folder(folder), spec.eos_ids, limits, device)
        finally:
            engine.close()

    def check(self, prompt: str, sampling: dict[str, object], told: Told) -> Replayed:
        """Compute a stream again. Equal ones are computed once."""
        name = json.dumps([prompt, sampling, told.tokens, told.logprobs, told.levels, told.runs])
        if name not in self._known:
            params = parse_sampling_parameters(sampling, self._limits)
            ids = self._tokenizer.encode_prompt(prompt, self._limits.max_tokens - 1)
            self._known[name] = self.replay(ids, params, told)
        return self._known[name]

    def replay(self, prompt: list[int], params: SamplingParams, told: Told) -> Replayed:
        """Compute a stream again, from token ids."""
        if not len(told.tokens) == len(told.logprobs) == len(told.levels):
            return Replayed(wrong="a token without its level or log probability")
        everything, text, reached = [*prompt, *told.tokens], Text(list(prompt)), 0
        row, found = SamplingRow(params, text), Replayed()
        for first, end, level in self._levels(told.runs):
            if reached == len(everything):
                break  # what follows are tokens that a stop string has cut off
            if first not in (0, reached):
                found.wrong = f"after {reached} positions the history goes on at {first}"
                return found
            end = min(end, len(everything))
            rungs = self._oracle.levels[level]
            logits = self._oracle.logits(0, everything[first:end], first, rungs)
            reached = end
            likely = logits.log_softmax(dim=-1)
            best = logits.argmax(dim=-1).tolist() if row.plain and not row.draws else None
            for at in range(len(text.tokens) - 1, min(end, len(everything) - 1)):
                place, token, here = len(text.tokens) - len(prompt), everything[at + 1], at - first
                found.compared += 1
                if told.levels[place] != level:
                    wrong = f"its level is told as {told.levels[place]}"
                elif abs((expected := float(likely[here, token])) - told.logprobs[place]) > NEAR_TIE:
                    wrong = f"its log probability is {told.logprobs[place]:.4f}, should be {expected:.4f}"
                elif token != (best[here] if best else self._choose(logits[here], row)):
                    found.ties += 1
                    wrong = "" if self._nearly(token, logits[here], row) else f"{token} should not have been chosen"
                else:
                    wrong = ""
                if wrong:
                    found.wrong = f"token {place}, at level {level}: {wrong}"
                    return found
                text.tokens.append(token)
        if len(text.tokens) != len(everything):
            found.wrong = f"{len(everything) - len(text.tokens)} tokens have no history"
        return found

    @staticmethod
    def _levels(runs: Sequence[Run]) -> list[Run]:
        """The runs, where what came from the prefix cache has the level of what follows it: others were not reused.

        Neighbours of one level are one run: the reference computes it in one go.
        """
        joined: list[Run] = []
        for at, (first, end, level) in enumerate(runs):
            if level == CACHED:
                level = runs[at + 1][2] if at + 1 < len(runs) else 0
            if first and joined and joined[-1][1:] == (first, level):
                joined[-1] = (joined[-1][0], end, level)
            else:
                joined.append((first, end, level))
        return joined

    def _nearly(self, token: int, logits: torch.Tensor, row: SamplingRow) -> bool:
        """Whether a token would be chosen with a score that is higher by less than what rounding makes."""
        raised = logits.clone()
        raised[token] += NEAR_TIE
        return any(self._choose(raised, row, off) == token for off in (0.0, BORDER, -BORDER))

    def _choose(self, logits: torch.Tensor, row: SamplingRow, border: float = 0.0) -> int:
        """The token that these scores give; `border` moves `top_p`."""
        if border and row.params.top_p < 1:
            moved = msgspec.structs.replace(row.params, top_p=min(1.0, row.params.top_p + border))
            row = SamplingRow(moved, row.sequence)
        return self._sampler.sample(logits[None].to(self._device, copy=True), [row]).tokens[0]


def _drawer(device: str) -> Drawer:
    """What an engine on such a device draws with."""
    if device == "cpu":
        return GeneratorDrawer(torch.device(device))
    from morph_runtime.kernels.cuda.drawer import CounterDrawer  # needs Triton-lang

    return CounterDrawer()
