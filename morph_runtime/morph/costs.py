"""What steps and shifts cost at every level: the controller's and the simulator's idea of the engine's speed.

A step's time is the sum of what its tokens cost in the layers' linear parts, which depends on the rung of each layer,
and of what attention reads, which does not. Layers of one rung cost the same, so a level between two uniform ones
costs their mean, weighted by the number of layers.

Where steps with prompt tokens are run as they are, the curves of `whole_s` hold steps of decodes alone up to
`max_num_seqs` tokens and prompts beyond, and what a step with prompt tokens costs more or less than one of as many
decodes is in `prompt_s` and `row_s`. Where they are padded (CUDA graphs), their time is a staircase of its own:
`padded_s`, one time for each size to which steps are padded.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from morph_runtime.morph.levels import LevelPlan

Floats = NDArray[np.float64]
Numbers = float | int | Floats | NDArray[np.int64]


@dataclass(frozen=True)
class StepCosts:
    """A cost model of one engine on one device; all times in seconds.

    Attributes:
        rungs: names of the rungs, `full` first, then the ladder.
        tokens: numbers of tokens of a step at which the next field holds times, rising from 1; G of them.
        whole_s: float64 [rungs, G], a step with all layers at one rung, with an empty KV cache.
        context_s: per token of KV that decodes read, all decodes together.
        pair_s: per (prompt token, token it attends to) of prefills.
        counts: int [levels, rungs], how many layers of each level are at each rung.
        down_s: one layer down, from the decision to its capacity being published; a walk of n layers takes n times it.
        up_s: one layer up, likewise.
        mean_context_s: per token of the decodes' mean context, however many they are: a long context takes its time
            even where one request alone reads it.
        chunk_s: per token that a prompt token attends to on average: keys and values are gathered once per chunk.
        prompt_s: float64 [G] or None: by number of tokens, what a step with prompt tokens takes beyond `whole_s`: it
            needs fewer logits, and on a GPU without graphs it is launched kernel by kernel.
        row_s: per decode in a step with prompt tokens: its logits, its sampling, its share of attention's calls.
        mixed_s: a step out of graphs at a level between uniform ones takes so much beyond the mean: one of decodes, and
            one with prompt tokens where these are padded.
        downs_s: one layer down to each rung of the ladder; empty: `down_s` for all.
        ups_s: one layer up from each rung of the ladder; empty: `up_s` for all.
        depth: layers that may change within one step.
        step_sizes: numbers of tokens to which steps with prompt tokens are padded, ascending, S of them; empty: they
            are not padded.
        padded_s: float64 [rungs, S], a step with prompt tokens of each of these sizes, all layers at one rung, with an
            empty KV cache; stands for `whole_s` and `prompt_s` in such steps. None where `step_sizes` is empty.
        mixed_sizes: those of `step_sizes` to which steps are padded at levels between uniform ones, the largest among
            them; empty: to all.
    """

    rungs: tuple[str, ...]
    tokens: Floats
    whole_s: Floats
    context_s: float
    pair_s: float
    counts: NDArray[np.int64]
    down_s: float
    up_s: float
    mean_context_s: float = 0.0
    chunk_s: float = 0.0
    prompt_s: Floats | None = None
    row_s: float = 0.0
    mixed_s: float = 0.0
    downs_s: tuple[float, ...] = ()
    ups_s: tuple[float, ...] = ()
    depth: int = 1
    step_sizes: tuple[int, ...] = ()
    padded_s: Floats | None = None
    mixed_sizes: tuple[int, ...] = ()

    @property
    def max_level(self) -> int:
        """The deepest level."""
        return len(self.counts) - 1

    def step_s(self, level: Numbers, decodes: Numbers, context: Numbers, prefill: Numbers, pairs: Numbers) -> Floats:
        """Seconds of a step; all arguments broadcast against each other.

        Args:
            level: the level at which it runs.
            decodes: requests that decode a token each.
            context: tokens of KV that they read, all together.
            prefill: prompt tokens, all requests together.
            pairs: sum over these of the tokens each attends to; `pairs_of` gives it.
        """
        seconds: Floats = self.fixed_s(level, decodes, prefill) + self.reads_s(decodes, context, prefill, pairs)
        return seconds

    def fixed_s(self, level: Numbers, decodes: Numbers, prefill: Numbers) -> Floats:
        """The part of `step_s` that does not depend on what attention reads."""
        decodes, prefill = np.asarray(decodes, dtype=np.float64), np.asarray(prefill, dtype=np.float64)
        count = np.maximum(decodes + prefill, 1.0)
        # A level has at most two rungs, but levels of one call may be many: a curve per rung, then the mean.
        curves = np.stack([self._curve(row, count) for row in self.whole_s], axis=-1)
        shares = self._shares[np.asarray(level, dtype=np.int64)]
        fixed: Floats = (curves * shares).sum(axis=-1)
        between = shares.max(axis=-1) < 1.0
        mixed = self.mixed_s * between
        if self.padded_s is not None:
            padded = (self._padded(count, between) * shares).sum(axis=-1) + decodes * self.row_s
            steps: Floats = np.where(prefill > 0, padded, fixed) + mixed
            return steps
        if self.prompt_s is None:
            prompts = decodes * self.row_s
        else:
            prompts = np.interp(count, self.tokens, self.prompt_s) + decodes * self.row_s
        seconds: Floats = fixed + np.where(prefill > 0, prompts, mixed)
        return seconds

    def reads_s(self, decodes: Numbers, context: Numbers, prefill: Numbers, pairs: Numbers) -> Floats:
        """The part of `step_s` that attention takes for what it reads; it does not depend on the level."""
        context, pairs = np.asarray(context, dtype=np.float64), np.asarray(pairs, dtype=np.float64)
        mean_context, mean_pairs = context / np.maximum(decodes, 1), pairs / np.maximum(prefill, 1)
        reads: Floats = context * self.context_s + mean_context * self.mean_context_s
        reads = reads + pairs * self.pair_s + mean_pairs * self.chunk_s
        return reads

    def seconds(self, level: int, decodes: int, context: int, prefill: int, pairs: int) -> float:
        """`step_s` of one step, without arrays (1 µs against 30): for the step loop."""
        tokens, curve, prompts, padded, mixed = self._tables[level]
        count = decodes + prefill or 1
        if prefill and padded:
            sizes = self.step_sizes
            seconds = padded[min(bisect_left(sizes, count), len(sizes) - 1)] * max(count / sizes[-1], 1.0) + mixed
            seconds += decodes * self.row_s + pairs * self.pair_s + pairs / prefill * self.chunk_s
            if decodes:
                seconds += context * self.context_s + context / decodes * self.mean_context_s
            return seconds
        at = min(max(bisect_right(tokens, count) - 1, 0), len(tokens) - 2)
        share = max((count - tokens[at]) / (tokens[at + 1] - tokens[at]), 0.0)
        seconds = curve[at] + share * (curve[at + 1] - curve[at])
        if prefill:
            share = min(share, 1.0)
            seconds += prompts[at] + share * (prompts[at + 1] - prompts[at]) + decodes * self.row_s
            seconds += pairs * self.pair_s + pairs / prefill * self.chunk_s
        else:
            seconds += mixed
        if decodes:
            seconds += context * self.context_s + context / decodes * self.mean_context_s
        return seconds

    def shift_s(self, source: int, target: int, step_s: float = 0.0) -> float:
        """Seconds from the decision until the engine is at `target`, its capacity published.

        Args:
            source: the level from which.
            target: the level to which.
            step_s: seconds of the steps that run meanwhile: layers change at their boundaries, `depth` of them at most.
        """
        walked = slice(source + 1, target + 1) if target > source else slice(target + 1, source + 1)
        one_s = self._walk_s[0 if target > source else 1, walked]
        return float(np.maximum(one_s, step_s / self.depth).sum())

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the model back."""
        return {
            "rungs": list(self.rungs), "tokens": self.tokens.tolist(), "whole_s": self.whole_s.tolist(),
            "context_s": self.context_s, "pair_s": self.pair_s, "down_s": self.down_s, "up_s": self.up_s,
            "mean_context_s": self.mean_context_s, "chunk_s": self.chunk_s,
            "prompt_s": None if self.prompt_s is None else self.prompt_s.tolist(),
            "row_s": self.row_s, "mixed_s": self.mixed_s, "downs_s": list(self.downs_s), "ups_s": list(self.ups_s),
            "depth": self.depth, "step_sizes": list(self.step_sizes),
            "padded_s": None if self.padded_s is None else self.padded_s.tolist(),
            "mixed_sizes": list(self.mixed_sizes),
        }  # fmt: skip

    @staticmethod
    def from_json(values: Mapping[str, Any], plan: LevelPlan) -> StepCosts:
        """The model that `to_json` gave, for the levels of a plan.

        Raises:
            KeyError: a field is missing; those that have a default may be.
            TypeError, ValueError: a value is not what it should be, or its rungs are not those of the plan.
        """
        rungs = tuple(values["rungs"])
        if rungs != ("full", *plan.ladder):
            raise ValueError(f"the costs are of the rungs {', '.join(map(str, rungs))}")
        costs = StepCosts(
            rungs=rungs,
            tokens=_floats(values["tokens"]),
            whole_s=_floats(values["whole_s"]),
            context_s=float(values["context_s"]),
            pair_s=float(values["pair_s"]),
            counts=layer_counts(plan),
            down_s=float(values["down_s"]),
            up_s=float(values["up_s"]),
            mean_context_s=float(values.get("mean_context_s", 0.0)),
            chunk_s=float(values.get("chunk_s", 0.0)),
            prompt_s=None if values.get("prompt_s") is None else _floats(values["prompt_s"]),
            row_s=float(values.get("row_s", 0.0)),
            mixed_s=float(values.get("mixed_s", 0.0)),
            downs_s=tuple(map(float, values.get("downs_s", ()))),
            ups_s=tuple(map(float, values.get("ups_s", ()))),
            depth=int(values.get("depth", 1)),
            step_sizes=tuple(map(int, values.get("step_sizes", ()))),
            padded_s=_floats(values["padded_s"]) if values.get("step_sizes") else None,
            mixed_sizes=tuple(map(int, values.get("mixed_sizes", ()))),
        )
        costs.check()
        return costs

    def check(self) -> None:
        """Make sure that the fields hold together.

        Raises:
            ValueError: they do not; the text says which.
        """
        sizes, ladder = len(self.tokens), len(self.rungs) - 1
        if self.tokens.ndim != 1 or sizes < 2 or self.tokens[0] != 1 or not (np.diff(self.tokens) > 0).all():
            raise ValueError("tokens must rise from 1, two numbers or more")
        if self.whole_s.shape != (ladder + 1, sizes) or not (self.whole_s > 0).all():
            raise ValueError("whole_s must be positive, one row per rung and one column per number of tokens")
        if self.prompt_s is not None and self.prompt_s.shape != (sizes,):
            raise ValueError("prompt_s must have one value per number of tokens")
        times = (self.context_s, self.pair_s, self.mean_context_s, self.chunk_s, self.mixed_s, self.down_s, self.up_s)
        lists = (*times, *self.downs_s, *self.ups_s)
        if not all(np.isfinite(lists)) or min(lists) < 0 or not np.isfinite([*self.whole_s.flat, self.row_s]).all():
            raise ValueError("times must be finite, and not negative")
        if self.prompt_s is not None and not np.isfinite(self.prompt_s).all():
            raise ValueError("times must be finite, and not negative")
        steps = np.asarray(self.step_sizes)
        if len(steps) and (steps[0] < 1 or not (np.diff(steps) > 0).all()):
            raise ValueError("step_sizes must rise, from 1 or more")
        if self.mixed_sizes and self.mixed_sizes != tuple(n for n in self.step_sizes if n in self.mixed_sizes):
            raise ValueError("mixed_sizes must be some of step_sizes")
        if self.mixed_sizes and self.mixed_sizes[-1] != self.step_sizes[-1]:
            raise ValueError("mixed_sizes must end as step_sizes do")
        padded = np.zeros((ladder + 1, 0)) if self.padded_s is None else self.padded_s
        if padded.shape != (ladder + 1, len(steps)) or not (np.isfinite(padded) & (padded > 0)).all():
            raise ValueError("padded_s must be positive, one row per rung and one column per size of step_sizes")
        if any(len(times) not in (0, ladder) for times in (self.downs_s, self.ups_s)) or self.depth < 1:
            raise ValueError("downs_s and ups_s must have one value per rung of the ladder, depth must be positive")

    @cached_property
    def _shares(self) -> Floats:
        """Share of the layers at each rung, [levels, rungs]."""
        shares: Floats = self.counts / self.counts[0].sum()
        return shares

    @cached_property
    def _walk_s(self) -> Floats:
        """[2, levels]: the change between level k - 1 and k, down and up; 0 at level 0."""
        layers, steps = int(self.counts[0].sum()), np.zeros((2, len(self.counts)))
        for way, (each, every) in enumerate(((self.downs_s, self.down_s), (self.ups_s, self.up_s))):
            steps[way, 1:] = np.repeat(each, layers) if each else every
        return steps

    @cached_property
    def _tables(self) -> list[tuple[list[float], list[float], list[float], list[float], float]]:
        """By level: sizes, the curve at the level, `prompt_s`, `padded_s` at the level, and what its mixture adds."""
        prompts = np.zeros(len(self.tokens)) if self.prompt_s is None else self.prompt_s
        curves = self._shares @ self.whole_s  # [levels, G]
        padded = np.zeros((len(curves), 0)) if self.padded_s is None else self._shares @ self.padded_s  # [levels, S]
        tokens, more = self.tokens.tolist(), prompts.tolist()
        return [
            (tokens, curve.tolist(), more, steps[self._mixed_at].tolist(), self.mixed_s)
            if shares.max() < 1
            else (tokens, curve.tolist(), more, steps.tolist(), 0.0)
            for curve, steps, shares in zip(curves, padded, self._shares, strict=True)
        ]

    @cached_property
    def _mixed_at(self) -> NDArray[np.int64]:
        """[S]: the place of the size that serves at a level between uniform ones in place of each of `step_sizes`."""
        sizes = np.asarray(self.step_sizes)
        kept = np.flatnonzero(np.isin(sizes, self.mixed_sizes or sizes))
        places: NDArray[np.int64] = kept[np.searchsorted(kept, np.arange(len(sizes)))]
        return places

    def _padded(self, count: Floats, between: NDArray[np.bool_]) -> Floats:
        """`padded_s` at the size that holds `count` tokens, [..., rungs]; in proportion beyond the largest.

        `between`: whether the level is one between uniform ones; broadcasts against `count`.
        """
        assert self.padded_s is not None
        sizes = np.asarray(self.step_sizes, dtype=np.float64)
        at = np.minimum(np.searchsorted(sizes, count), len(sizes) - 1)
        at = np.where(between, self._mixed_at[at], at)
        steps: Floats = self.padded_s.T[at] * np.maximum(count / sizes[-1], 1.0)[..., None]
        return steps

    def _curve(self, times: Floats, count: Floats) -> Floats:
        """Between the measured sizes a straight line; beyond the last one, in proportion to the last stretch."""
        inside: Floats = np.interp(count, self.tokens, times)
        slope = (times[-1] - times[-2]) / (self.tokens[-1] - self.tokens[-2])
        beyond: Floats = np.maximum(count - self.tokens[-1], 0.0) * slope
        return inside + beyond


def _floats(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float64)


def layer_counts(plan: LevelPlan) -> NDArray[np.int64]:
    """How many layers are at each rung, int64 [levels, 1 + len(ladder)]."""
    names: Sequence[str] = ("full", *plan.ladder)
    return np.array([[plan.rungs(k).count(n) for n in names] for k in range(plan.max_level + 1)])


def pairs_of(start: int, length: int) -> int:
    """Pairs of a prompt token and a token it attends to, for `length` tokens from position `start` on."""
    return length * start + length * (length + 1) // 2
