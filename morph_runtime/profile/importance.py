"""In which order to quantize layers: the scores and the greedy search of MorphServe (arXiv 2506.02006, section 4.2).

cos(a, b) = a.b / (|a| |b|), for each token, and then the mean over all tokens:

* LTS of a layer: its output against its input. High: it changes little.
* LRS: its output at full precision against its output quantized, on the same input. High: quantizing distorts little.
* MDS given the layers Q that are quantized already: the logits with Q against the logits with Q and this layer.
* LIS = weights . (LTS, LRS, MDS). The layer with the highest LIS goes next (Algorithm 1).

The paper leaves open over what a score is averaged and what the model's output is; here it is the mean over tokens, and
the logits of every position. All else is as printed there. LTS and LRS are taken on full-precision inputs, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from morph_runtime.profile.forward import LayeredForward, Walk
from morph_runtime.profile.text import Windows
from morph_runtime.profile.weights import Form, LayerStore, full_mix

PAPER_WEIGHTS = (0.25, 0.25, 0.5)
"""Of LTS, LRS and MDS."""


@dataclass(frozen=True)
class LayerScores:
    """The scores of one layer at the moment when it was chosen."""

    layer: int
    lts: float
    lrs: float
    mds: float
    lis: float


def find_order(
    forward: LayeredForward,
    store: LayerStore,
    windows: Windows,
    form: Form,
    weights: tuple[float, float, float] = PAPER_WEIGHTS,
    say: Callable[[str], None] = lambda words: None,
) -> list[LayerScores]:
    """Algorithm 1: all layers, the first to be quantized first.

    Takes L (L + 1) / 2 evaluations of the text; one of layer j runs the layers from j on only, for those ahead of it
    are as they were. Ties go to the layer nearer the front.

    Args:
        forward: for windows of this length.
        store: has `full` and `form`.
        windows: the text. Their hidden states between all layers are kept: tokens * (L + 1) * hidden numbers.
        form: what layers are quantized to.
        weights: of LTS, LRS and MDS.
        say: told about progress.
    """
    layers = store.models["full"].spec.layers
    mix = full_mix(layers)
    with torch.inference_mode():
        walks = [Walk(forward, store, tokens) for tokens in windows.tokens]
        for walk in walks:
            walk.run(mix)
        fixed = [_mean_pair(_own_scores(walk, number, form) for walk in walks) for number in range(layers)]
        left, chosen = list(range(layers)), list[LayerScores]()
        while left:
            say(f"{form}: place {len(chosen) + 1} of {layers}")
            effects = [0.0] * layers
            for walk in walks:
                now = _unit(walk.run(mix))
                for number in left:
                    effects[number] += _cosine(now, walk.run_changed(number, form)) / len(walks)
            rated = []
            for number in left:
                (lts, lrs), mds = fixed[number], effects[number]
                lis = weights[0] * lts + weights[1] * lrs + weights[2] * mds
                rated.append(LayerScores(number, lts, lrs, mds, lis))
            best = max(rated, key=lambda scores: scores.lis)
            chosen.append(best)
            left.remove(best.layer)
            mix = (*mix[: best.layer], form, *mix[best.layer + 1 :])
    return chosen


def _own_scores(walk: Walk, number: int, form: Form) -> tuple[float, float]:
    """LTS and LRS of a layer, in one window."""
    before, after = walk.states[number], walk.states[number + 1]
    return _cosine(_unit(after), before), _cosine(_unit(after), walk.one_layer(number, form))


def _unit(a: Tensor) -> Tensor:
    """Rows [T, n] at length 1, float64: near a cosine of 1, where layers are told apart, float32 has too few digits."""
    return F.normalize(a.double(), dim=-1)


def _cosine(unit: Tensor, b: Tensor) -> float:
    """The mean cosine of the rows of two tensors [T, n], the first of `_unit`."""
    wide = b.double()
    return float((torch.linalg.vecdot(unit, wide) / torch.linalg.vector_norm(wide, dim=-1).clamp_min(1e-300)).mean())


def _mean_pair(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    lts, lrs = zip(*pairs, strict=True)
    return math.fsum(lts) / len(lts), math.fsum(lrs) / len(lrs)
