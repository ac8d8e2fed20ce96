"""A scripted schedule of levels, up and down in mid-request: every token's logits equal those of a slow reference.

The reference is a dense decoder in float32, written apart from the engine's. It replays what the
engine did (which tokens of which request at which level) with the dequantized weights of that
level's rungs, keeping keys and values as they were computed. It knows nothing of blocks, pages,
batches or kernels, so it agrees only if none of them ever lost or mixed up anything. With the prefix
cache on, a ledger beside it says which of its own keys and values stand in which block: a request that
was given blocks goes on from these, after a check of their tokens and of the levels that wrote them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from engine.conftest import run_all, submit
from morph_runtime.scheduler import StepPlan
from tests.oracle import DenseRequest, Oracle, oracle_for, weights_of
from weights.awq_packer import make_awq

if TYPE_CHECKING:
    from engine.conftest import EngineFactory
    from morph_runtime.engine.core import Engine

ABSOLUTE_TOLERANCE = 2e-3
"""On logits of magnitude ~10; float32 rounding through four layers stays an order below it."""


@dataclass(frozen=True)
class Ran:
    """A slice that the engine ran: all tokens up to its end, and the logits of the last, if they were wanted."""

    key: int
    tokens: list[int]
    start: int
    level: int
    rungs: tuple[str, ...]
    table: list[int]
    logits: torch.Tensor | None


@dataclass(frozen=True)
class Moved:
    """Blocks that the engine copied: (source, target)."""

    pairs: list[tuple[int, int]]


def record(engine: Engine, log: list[Ran | Moved]) -> None:
    """Write down every slice that the engine runs, with the rungs in force and the logits it gave."""
    scheduler, decoder, swapper = engine.parts.scheduler, engine.parts.runner.decoder, engine.parts.swapper
    schedule, forward = scheduler.schedule, decoder.forward
    copy_blocks = engine.parts.cache.copy_blocks
    plans: list[StepPlan] = []

    def scheduled(level: int) -> StepPlan:
        plans.append(schedule(level))
        return plans[-1]

    def forwarded(batch, layers):  # type: ignore[no-untyped-def]
        logits = forward(batch, layers)
        rows = iter(logits.clone())
        ids = iter(batch.token_ids.tolist())
        for part in plans[-1].slices:
            tokens = [*part.request.tokens[: part.start], *itertools.islice(ids, part.length)]
            table = list(part.request.blocks)
            wanted = next(rows) if part.samples else None
            log.append(Ran(part.request.key, tokens, part.start, engine.level, swapper.rungs, table, wanted))
        return logits

    def copied(pairs):  # type: ignore[no-untyped-def]
        log.append(Moved(list(pairs)))
        copy_blocks(pairs)

    scheduler.schedule = scheduled  # type: ignore[method-assign]
    decoder.forward = forwarded  # type: ignore[method-assign]
    engine.parts.cache.copy_blocks = copied  # type: ignore[method-assign]


@dataclass(frozen=True)
class Content:
    """What stands in one token's place: the tokens up to it, the levels it depends on, K and V of each layer."""

    tokens: list[int]
    levels: frozenset[int]
    rows: list[tuple[torch.Tensor, torch.Tensor]]


class Ledger:
    """Where the oracle's keys and values stand in the engine's blocks."""

    def __init__(self, oracle: Oracle, block_tokens: int, reuse: str) -> None:
        self._oracle = oracle
        self._block_tokens = block_tokens
        self._reuse = reuse
        self._places: dict[tuple[int, int], Content] = {}
        self._reached: dict[int, int] = {}
        self.reused = 0

    def replay(self, ran: Ran) -> torch.Tensor:
        """Logits [vocab] after a slice that goes on from what its block table holds."""
        contents = [self._places[self._place(ran, position)] for position in range(ran.start)]
        assert all(content.tokens == ran.tokens[: i + 1] for i, content in enumerate(contents))
        if ran.start and ran.start != self._reached.get(ran.key):
            self._check_reuse(ran, contents)
        self._oracle.requests[ran.key] = state = DenseRequest()
        for layer in range(len(ran.rungs) if contents else 0):
            state.keys[layer] = torch.stack([content.rows[layer][0] for content in contents])
            state.values[layer] = torch.stack([content.rows[layer][1] for content in contents])
        logits = self._oracle.replay(ran.key, ran.tokens[ran.start :], ran.start, ran.rungs)
        state = self._oracle.requests[ran.key]
        levels = (contents[-1].levels if contents else frozenset()) | {ran.level}
        for position in range(ran.start, len(ran.tokens)):
            rows = [(state.keys[layer][position], state.values[layer][position]) for layer in range(len(ran.rungs))]
            self._places[self._place(ran, position)] = Content(ran.tokens[: position + 1], levels, rows)
        self._reached[ran.key] = len(ran.tokens)
        return logits

    def move(self, moved: Moved) -> None:
        """Follow a migration."""
        for source, target in moved.pairs:
            for offset in range(self._block_tokens):
                if (source, offset) in self._places:
                    self._places[target, offset] = self._places[source, offset]

    def _place(self, ran: Ran, position: int) -> tuple[int, int]:
        return ran.table[position // self._block_tokens], position % self._block_tokens

    def _check_reuse(self, ran: Ran, contents: list[Content]) -> None:
        self.reused += ran.start
        levels = frozenset().union(*(content.levels for content in contents))
        if self._reuse == "at_least":
            assert max(levels) <= ran.level
            return
        assert levels == {ran.level}
        anew = -1
        self._oracle.replay(anew, ran.tokens[: ran.start], 0, ran.rungs)
        for layer in range(len(ran.rungs)):
            given = torch.stack([content.rows[layer][0] for content in contents])
            torch.testing.assert_close(given, self._oracle.requests[anew].keys[layer], atol=1e-4, rtol=1e-4)


def scripted_levels(engine: Engine) -> Callable[[int], None]:
    """Up and down, sometimes in the middle of a shift, every six steps."""
    top = len(engine.parts.capacities) - 1
    schedule = [0, 0, 3, top, 1, top, 0, 2, top - 1]

    def scripted(step: int) -> None:
        if step % 6 == 0:
            engine.parts.shifter.target = schedule[step // 6 % len(schedule)]
            if step % 12 == 0 and step % 5:
                engine.parts.shifter.settle()

    return scripted


@pytest.mark.parametrize("ladder", [["w4"], ["w8", "w4"]])
@pytest.mark.parametrize("awq", [False, True], ids=["rounded", "awq"])
def test_every_logit_equals_the_reference_with_the_same_level_schedule(
    tiny_model: Path, engines: EngineFactory, tmp_path: Path, ladder: list[str], awq: bool
) -> None:
    engine = engines(
        tiny_model,
        model={"awq_path": str(make_awq(tiny_model, tmp_path))} if awq else {},
        morph={"ladder": ladder, "order": "2,0,3,1"},
        memory={"kv_tokens": 256},
        cache={"prefix": False},
    )
    engine.set_level(len(engine.parts.capacities) - 1)
    rescaled = awq and engine.parts.spec.kv_heads == engine.parts.spec.heads
    assert all((layer.o.input_scale is not None) == rescaled for layer in engine.parts.swapper.layers)
    oracle = oracle_for(engine, tiny_model)
    log: list[Ran | Moved] = []
    record(engine, log)
    rng = random.Random(5)
    for key in range(10):
        submit(engine, key, [rng.randrange(1, 200) for _ in range(rng.randint(1, 100))], 40)
    run_all(engine, scripted_levels(engine))
    slices = [entry for entry in log if isinstance(entry, Ran)]
    assert len({ran.rungs for ran in slices}) > len(engine.parts.capacities) // 2, "the schedule must visit many levels"
    compared = 0
    for ran in slices:
        expected = oracle.replay(ran.key, ran.tokens[ran.start :], ran.start, ran.rungs)
        if ran.logits is not None:
            torch.testing.assert_close(ran.logits, expected, atol=ABSOLUTE_TOLERANCE, rtol=0)
            compared += 1
    assert compared == 400


@pytest.mark.parametrize("reuse, overlap", [("exact", "off"), ("at_least", "off"), ("at_least", "on")])
def test_every_logit_equals_the_reference_when_prefixes_are_shared_across_levels(
    tiny_model: Path, engines: EngineFactory, reuse: str, overlap: str
) -> None:
    engine = engines(
        tiny_model, morph={"order": "2,0,3,1"}, memory={"kv_tokens": 256}, cache={"reuse": reuse}, overlap=overlap
    )
    oracle = oracle_for(engine, tiny_model)
    log: list[Ran | Moved] = []
    record(engine, log)
    rng = random.Random(6)
    stems = [[rng.randrange(1, 200) for _ in range(60)] for _ in range(2)]
    for key in range(24):
        submit(engine, key, [*rng.choice(stems)[: rng.choice([20, 60])], *[rng.randrange(1, 200)] * (key % 9 + 1)], 24)
    run_all(engine, scripted_levels(engine))
    ledger = Ledger(oracle, engine.parts.config.memory.block_tokens, reuse)
    compared = 0
    for entry in log:
        if isinstance(entry, Moved):
            ledger.move(entry)
            continue
        expected = ledger.replay(entry)
        if entry.logits is not None:
            torch.testing.assert_close(entry.logits, expected, atol=ABSOLUTE_TOLERANCE, rtol=0)
            compared += 1
    assert compared == 24 * 24
    assert engine.parts.resizer.blocks_migrated > 0, "the test must migrate"
    assert ledger.reused > 200, "the test must share"


def test_the_oracle_notices_a_wrong_rung(tiny_model: Path, engines: EngineFactory) -> None:
    engine = engines(tiny_model)
    engine.set_level(1)
    weights = [weights_of(engine, layer) for layer in range(engine.parts.spec.layers)]
    log: list[Ran | Moved] = []
    record(engine, log)
    submit(engine, 1, [5, 6, 7], 1)
    engine.set_level(0)
    run_all(engine)
    oracle = Oracle(tiny_model, lambda layer, _: weights[layer])
    ran = log[0]
    assert isinstance(ran, Ran) and ran.logits is not None
    assert (oracle.replay(ran.key, ran.tokens, ran.start, ran.rungs) - ran.logits).abs().max() > 10 * ABSOLUTE_TOLERANCE
