"""What would come of each level: TTFT of what waits and of what will come, TPOT of what runs.

A coarse simulation of the engine, one column for each future that is compared, all of them at once. Time goes in
intervals that grow, so that the next tenth of a second and the next twenty seconds are both in it. In each interval
the engine's steps are alike: decodes, and beside them as much prefill as `max_batched_tokens` leaves room for;
requests get in as far as computing, KV blocks and places allow, and leave after as many steps as they have tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from morph_runtime.morph.backlog import backlog_of
from morph_runtime.morph.costs import StepCosts
from morph_runtime.morph.load import Bools, Floats, Ints, Load, suffix_sums
from morph_runtime.slo import SloClass

INTERVALS, FIRST_S, GROWTH = 10, 0.05, 1.8
"""22.3 s in all."""
BURST_S = 5.0
"""Time in which an arrival rate above its mean is expected to fall back to it (e-fold)."""
NO_BOUND = 1e9
ALONE_MARGIN = 1.1
"""Times what a request takes by itself that counts as meeting a target, within the widest bound."""
SHORTEST_S = 1e-6
"""Of a step, should a cost model say less."""


@dataclass(frozen=True)
class Futures:
    """The futures that are compared, C of them.

    Attributes:
        levels: int64 [C], the level that is gone to.
        more: float64 [C], factor on the arrivals; above 1 where the forecast is to be on the safe side.
        lasting: bool [C], whether the present arrival rate lasts, else a burst falls back to the mean.
        bound: float64 [C], share of each target that counts as meeting it.
        widest: float64 [C], what that share may grow to where a request by itself needs more: a bound that the level
            could not meet with no load at all would say nothing of the load.
    """

    levels: Ints
    more: Floats
    lasting: Bools
    bound: Floats
    widest: Floats


@dataclass(frozen=True)
class Forecast:
    """What comes of each future; arrays have C entries.

    Attributes:
        levels: as asked for.
        score: 0 where every target is met; else the mean share by which targets are overrun.
        late: share of the requests whose TTFT is above its bound.
        ttft_s: the longest TTFT of those that wait or will come; of a preempted one, how long it will have stopped.
        tpot_s: mean time between two tokens; 0 if nothing decodes.
    """

    levels: Ints
    score: Floats
    late: Floats
    ttft_s: Floats
    tpot_s: Floats

    def part(self, start: int, stop: int) -> Forecast:
        """The futures from `start` to before `stop`."""
        at = slice(start, stop)
        return Forecast(self.levels[at], self.score[at], self.late[at], self.ttft_s[at], self.tpot_s[at])


FUTURE_SAMPLES = 4
"""Requests to come whose TTFT is forecast."""


class Forecaster:
    """Makes forecasts with the costs of one engine."""

    def __init__(self, costs: StepCosts, classes: Sequence[SloClass], max_batched_tokens: int) -> None:
        """`max_batched_tokens`: tokens of one step; loads that are forecast have no more."""
        self.costs = costs
        self.width = max_batched_tokens + 1
        levels, sizes = np.arange(costs.max_level + 1), np.arange(self.width)
        self.bare_s: Floats = costs.fixed_s(levels[:, None], sizes[None, :], 0).ravel()
        """Seconds of a step of n decodes at level k, without what attention reads: [k * width + n]."""
        self.full_s: Floats = costs.fixed_s(levels[:, None], 0, np.maximum(sizes[None, :], 1)).ravel()
        """The same of a step of n prompt tokens; a decode in it takes `row_s` more."""
        self._walks: dict[int, Floats] = {}
        self.ttft_s = np.array([entry.ttft_s for entry in classes])
        self.tpot_s = np.array([entry.tpot_s or NO_BOUND for entry in classes])
        self.edges = np.concatenate([[0.0], np.cumsum(FIRST_S * GROWTH ** np.arange(INTERVALS))])

    def walk_s(self, level: int) -> Floats:
        """Seconds of the walk from `level` to each level."""
        if level not in self._walks:
            self._walks[level] = np.array([self.costs.shift_s(level, k) for k in range(self.costs.max_level + 1)])
        return self._walks[level]

    def forecast(self, load: Load, futures: Futures) -> Forecast:
        """What would come of each future from now on."""
        run = _Run(self, load, futures)
        for at in range(INTERVALS):
            run.advance(at)
        return run.result()


class _Run:
    """One forecast's state, vectors over the futures; `advance` moves it through an interval."""

    def __init__(self, maker: Forecaster, load: Load, futures: Futures) -> None:
        self._maker, self._load, self._futures = maker, load, futures
        self._line = line = backlog_of(load)
        count = len(futures.levels)
        running = load.running
        order = np.argsort(running.output)
        self._ends: Floats = running.output[order]
        self._left = suffix_sums(np.ones(len(running)))
        self._left_blocks = suffix_sums(running.blocks[order])
        self._left_context = suffix_sums((running.context + running.uncomputed)[order])
        self._shared = load.shared
        zeros = np.zeros(count)
        self._steps, self._place, self._tokens, self._blocks = zeros, zeros, zeros, zeros
        self._decodes = np.full(count, float(len(running)))
        self._context = np.full(count, self._left_context[0])
        self._used = np.full(count, float(load.used))
        self._tpot_s, self._tpot_weight = zeros, zeros
        self._own_s = zeros
        self._cohorts = np.zeros((5, INTERVALS, count))
        """Requests admitted in an interval: their number, blocks, tokens; the steps at which that began and ended."""
        self._places = np.zeros((INTERVALS + 1, count))
        self._busy_s = np.zeros((INTERVALS, count))
        """Seconds of an interval after which it has got as far as it gets."""
        self._available = line.length + self._arrivals(maker.edges)
        self._available_tokens = np.interp(self._available, line.place, line.tokens)
        shift_s = maker.walk_s(load.level)[futures.levels]
        middles = (maker.edges[1:] + maker.edges[:-1]) / 2
        done = np.minimum(1.0, middles[:, None] / np.maximum(shift_s, 1e-9))
        self._levels: Ints = np.rint(load.level + (futures.levels - load.level) * done).astype(np.int64)
        # Going up, the room is given back before the layers change.
        room = np.where(futures.levels < load.level, futures.levels, self._levels)
        self._capacities = load.capacities[room].astype(np.float64)

    def _arrivals(self, times: Floats) -> Floats:
        """Requests that have come by each time, float64 [T, C]."""
        load, futures = self._load, self._futures
        # A rate above the mean is a burst, which may pass; one below it is a burst that has passed.
        fast, slow = load.arrivals_per_s, load.mean_arrivals_per_s or load.arrivals_per_s
        lasting = np.where(futures.lasting, fast, min(fast, slow))
        passing = np.where(futures.lasting, 0.0, max(fast - slow, 0.0))
        faded = BURST_S * (1 - np.exp(-times / BURST_S))
        came: Floats = (times[:, None] * lasting + faded[:, None] * passing) * futures.more
        return came

    def advance(self, at: int) -> None:
        """Move on through interval number `at`."""
        line, load, maker = self._line, self._load, self._maker
        seconds = maker.edges[at + 1] - maker.edges[at]
        size, costs = load.block_tokens, maker.costs
        capacity = self._capacities[at]
        row = self._levels[at] * maker.width

        # Two kinds of steps: with as much prefill as there is, for as long as there is, then without.
        decodes = np.minimum(self._decodes + 0.5, maker.width - 2).astype(np.int64)
        waits = self._available_tokens[at] - self._tokens
        chunk = np.minimum(np.maximum(waits, line.prompt), maker.width - 1 - decodes).astype(np.int64)
        reads = self._context * (costs.context_s + costs.mean_context_s / np.maximum(self._decodes, 1.0))
        attends = line.reach * (chunk * costs.pair_s + costs.chunk_s)
        full_s = (maker.full_s[row + decodes + chunk] + decodes * costs.row_s + reads + attends) * load.slowness
        full_s = np.maximum(full_s, SHORTEST_S)
        bare_s = (maker.bare_s[row + decodes] + reads) * load.slowness
        most = seconds / full_s
        # What does not fit is preempted and computed again: decodes get on as far as blocks do.
        pace = np.minimum(1.0, capacity / np.maximum(self._used, 1.0))

        # Prefill leaves fewer steps, so fewer requests end and make room for prefill. Both are known with no prefill
        # and with the most of it; between the two, a straight line meets what room allows with what it needs.
        ends = np.stack([seconds / bare_s, most]) * pace
        there, blocks, context = self._still_there(at, self._steps + ends)
        turnover = np.maximum(1.0, ends / line.output)
        # While it is there a request grows: the room that it takes is its mean over that time.
        grown = 1.0 + np.minimum(ends, line.output) / (2 * size * line.own)
        room = np.maximum(capacity - blocks, 0.0) * turnover / grown
        seats = np.maximum(load.max_running - there, 0.0) * turnover
        allowed = self._up_to(room, seats)
        fits = (np.interp(allowed, line.place, line.tokens) - self._tokens) / chunk
        full = fits[0] * most / (most + np.maximum(fits[0] - fits[1], 0.0))
        place = np.interp(self._tokens + np.minimum(full, most) * chunk, line.tokens, line.place)
        place = np.maximum(np.minimum(place, self._available[at + 1]), self._place)
        tokens, taken = np.interp(place, line.place, line.tokens), np.interp(place, line.place, line.blocks)
        full = (tokens - self._tokens) / chunk
        steps = (full + (seconds - full * full_s) / bare_s) * pace
        part = np.minimum(full / most, 1.0)
        # A line that is done sooner has not waited for the interval's end, unless for room that came bit by bit.
        at_once = self._up_to(np.maximum(capacity - self._used, 0.0), np.maximum(load.max_running - self._decodes, 0.0))
        allowed = allowed[0] + part * (allowed[1] - allowed[0])
        waited = np.clip((place - at_once) / np.maximum(allowed - at_once, 1e-9), 0.0, 1.0)
        self._busy_s[at] = np.minimum(np.maximum(full * full_s, waited * seconds), seconds)
        there, blocks, context = (none + part * (all_ - none) for none, all_ in (there, blocks, context))

        fresh = np.maximum(place, line.begun) - np.maximum(self._place, line.begun)
        cohort = self._cohorts[:, at]
        cohort[0], cohort[1], cohort[2] = fresh, taken - self._blocks, fresh * line.prompt
        cohort[3], cohort[4] = self._steps, self._steps + steps
        stay = np.minimum(1.0, line.output / np.maximum(steps, 1e-9))
        written = fresh * np.minimum(steps, line.output) / 2
        self._tpot_s = self._tpot_s + self._decodes * seconds
        self._tpot_weight = self._tpot_weight + self._decodes * steps
        self._decodes = there + stay * fresh
        self._used = blocks + stay * (cohort[1] + written / size)
        self._context = context + stay * (cohort[2] + written)
        self._steps, self._place, self._tokens, self._blocks = self._steps + steps, place, tokens, taken
        self._places[at + 1] = place
        if at == INTERVALS // 2:
            self._own_s = self._prompt_s(row, decodes, reads)

    def _prompt_s(self, row: Ints, decodes: Ints, reads: Floats | float) -> Floats:
        """Seconds that the typical prompt takes by itself, [C]: whole steps of it, and one with what is left over.

        Args:
            row: int64 [C], where the level's costs begin.
            decodes: int64 [C], beside it.
            reads: seconds that these take to read their context in a step.
        """
        maker, line, costs = self._maker, self._line, self._maker.costs
        prompt = int(np.ceil(line.prompt - 1e-6))
        room = np.maximum(maker.width - 1 - decodes, 1)
        whole, rest = np.divmod(prompt, room)
        steps = whole + (rest > 0)
        computing = whole * maker.full_s[row + decodes + room] + (rest > 0) * maker.full_s[row + decodes + rest]
        attending = line.reach * (prompt * costs.pair_s + steps * costs.chunk_s)
        result: Floats = (computing + attending + steps * (decodes * costs.row_s + reads)) * self._load.slowness
        return result

    def _bounds_s(self, targets_s: Floats, alone_s: Floats) -> Floats:
        """What counts as meeting each target, [T, C]: a share of it, or what a request takes with no load."""
        shares, widest = self._futures.bound * targets_s[:, None], self._futures.widest * targets_s[:, None]
        bounds: Floats = np.minimum(np.maximum(shares, ALONE_MARGIN * alone_s), np.maximum(shares, widest))
        return bounds

    def _up_to(self, blocks: Floats, seats: Floats) -> Floats:
        """The place in the line up to which so many blocks and seats suffice, [C] or [E, C] as they are."""
        line = self._line
        seated = np.maximum(self._place, line.begun)  # prefills under way have theirs
        return np.minimum(np.interp(self._blocks + blocks, line.blocks, line.place), seated + seats)

    def _still_there(self, at: int, steps: Floats) -> tuple[Floats, Floats, Floats]:
        """Requests, blocks and tokens in the cache of those admitted before interval `at`, after so many steps.

        Args:
            at: the interval.
            steps: float64 [E, C], since now; each row is another way in which it may go.

        Returns:
            three times float64 [E, C].
        """
        size, output = self._load.block_tokens, self._line.output
        gone = np.searchsorted(self._ends, steps, side="right")
        there = self._left[gone]
        blocks = self._shared + self._left_blocks[gone] + there * steps / size
        context = self._left_context[gone] + there * steps
        if at:
            number, began, ended = self._cohorts[0, :at], self._cohorts[3, :at], self._cohorts[4, :at]
            since = steps[:, None]
            alive = np.minimum(np.maximum((ended + output - since) / (ended - began + 1e-9), 0.0), 1.0)
            held, took, tokens = (self._cohorts[:3, None, :at] * alive).sum(axis=2)
            written = (np.minimum(since - (began + ended) / 2, output) * number * alive).sum(axis=1)
            there = there + held
            blocks = blocks + took + written / size
            context = context + tokens + written
        return there, blocks, context

    def result(self) -> Forecast:
        """What has come of it."""
        futures, maker, sample = self._futures, self._maker, self._line.sample
        shares = self._load.typical.slo_shares if len(self._load.typical.slo_shares) else np.ones(1)
        kinds = np.flatnonzero(shares > 0)
        horizon = maker.edges[-1]
        begins = np.linspace(0.0, horizon, FUTURE_SAMPLES, endpoint=False)
        arrivals = self._arrivals(np.append(begins, horizon))
        # TTFT of those that are here: [S, C]; of those to come: [F, C], each at once and for every class.
        here = self._reached_s(sample.place[:, None] + 1.0) + sample.age_s[:, None]
        coming = self._reached_s(self._line.length + arrivals[:-1]) - begins[:, None]
        coming = np.maximum(coming, 0.0) + self._own_s
        ttft = np.concatenate([here, np.repeat(coming, len(kinds), axis=0)])
        slo = np.concatenate([sample.slo, np.tile(kinds, len(begins))])
        each = np.outer(np.tile(shares[kinds], len(begins)), arrivals[-1] / len(begins))
        weight = np.concatenate([np.broadcast_to(sample.weight[:, None], here.shape), each])
        total = np.maximum(weight.sum(axis=0), 1e-9)
        row, none = futures.levels * maker.width, np.zeros(len(futures.levels), dtype=np.int64)
        bounds = self._bounds_s(maker.ttft_s, self._prompt_s(row, none, 0.0))
        over = ttft / bounds[slo] - 1.0
        score = (np.maximum(over, 0.0) * weight).sum(axis=0) / total
        late = ((over > 0) * weight).sum(axis=0) / total
        tpot = self._tpot_s / np.maximum(self._tpot_weight, 1e-9)
        running = self._load.running
        paces = self._bounds_s(maker.tpot_s, maker.bare_s[row + 1] * self._load.slowness)
        for kind in np.flatnonzero(maker.tpot_s < NO_BOUND):
            if len(running):
                share = float((running.slo == kind).mean())
            else:
                share = float(shares[kind]) if kind < len(shares) else 0.0
            score = score + share * np.maximum(tpot / paces[kind] - 1.0, 0.0)
        counted = np.where(weight > 0, ttft, 0.0)
        return Forecast(futures.levels, score, late, counted.max(axis=0), tpot)

    def _reached_s(self, place: Floats) -> Floats:
        """When the line is done up to each place, [S, C] from [S, C] or [S, 1]; beyond the horizon at the same pace."""
        edges, places = self._maker.edges, self._places
        place = np.broadcast_to(place - 1e-6, (len(place), places.shape[1]))  # sums that are equal but for rounding
        after = (places[:, None, :] < place[None]).sum(axis=0)
        first = np.clip(after - 1, 0, INTERVALS - 1)
        low, high = np.take_along_axis(places, first, 0), np.take_along_axis(places, first + 1, 0)
        part = np.clip((place - low) / np.maximum(high - low, 1e-9), 0.0, 1.0)
        inside = edges[first] + part * np.take_along_axis(self._busy_s, first, 0)
        # Who is not reached by the end is not reached before it, however soon the last interval came to a stop.
        inside = np.where(place > places[-1], edges[-1], inside)
        pace = (places[-1] - places[0]) / edges[-1]
        beyond = np.maximum(place - places[-1], 0.0) / np.maximum(pace, 1e-3)
        result: Floats = inside + beyond
        return result
