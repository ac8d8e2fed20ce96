"""A step in flight beside the host: the same tokens as one by one, whatever comes between."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine.conftest import make_model, run_all, submit
from engine.late_runner import LateRunner
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import StructuredOutputs
from tiny_model import tiny_tokenizer

if TYPE_CHECKING:
    from engine.conftest import EngineFactory

VOCAB = 320
HALF_MIN = {"min_tokens": 4, "ignore_eos": False}
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"ignore_eos": False, "stop_token_ids": tuple(range(1, VOCAB, 7))},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 1.5, "seed": 6, "top_k": 20, "ignore_eos": False, "stop_token_ids": tuple(range(0, VOCAB, 9))},
    {"temperature": 0.8, "seed": 7, "top_p": 0.9, "logprobs": 2},
    {"stop_token_ids": tuple(range(0, VOCAB, 3)), **HALF_MIN},
    {"logit_bias": ((9, 4.0),), "score": True},
)
KINDS_WITH_VALUES: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.3, "presence_penalty": 0.4},
    {"temperature": 1.0, "seed": 8, "frequency_penalty": 0.7},
    {"bad_word_ids": tuple((a, b) for a in range(30) for b in range(0, VOCAB, 2))},
    {"temperature": 1.0, "seed": 9, "structured_outputs": StructuredOutputs("regex", "[a-f]{3,9}-[0-9]{2}")},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model(tmp_path_factory.mktemp("overlap"), kv_heads=2, vocab=VOCAB)
    tiny_tokenizer().save(str(path / "tokenizer.json"))
    return path


@dataclass
class Told:
    """What an engine said of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    started: int = 0
    ends: list[str] = field(default_factory=list)


@dataclass
class Load:
    """The same random requests, arrivals and cancels for every engine; the clock is what the engine has told."""

    seed: int
    kinds: tuple[dict[str, Any], ...]
    count: int = 24
    cancels: bool = True

    def run(self, engine: Engine, levels: bool = False) -> dict[int, Told]:
        rng = random.Random(self.seed)
        stems = [[rng.randrange(1, VOCAB) for _ in range(60)] for _ in range(2)]
        told: dict[int, Told] = {}
        todo = []
        for key in range(self.count):
            prompt = [*rng.choice(stems)[: rng.choice([3, 17, 24])], *[rng.randrange(1, VOCAB)] * rng.randint(1, 20)]
            todo.append((key, prompt, rng.randint(1, 110), dict(rng.choice(self.kinds)), rng.randrange(3)))
        victims = set(rng.sample(range(self.count), self.count // 4)) if self.cancels else set()
        steps, goal = 0, 0
        while todo or engine.has_requests:
            steps += 1
            assert steps < 5000, "the engine makes no progress"
            if todo and steps % 2 == 0:
                key, prompt, max_tokens, kind, priority = todo.pop(0)
                told[key] = Told()
                submit(engine, key, prompt, max_tokens, priority=priority, **kind)
            if levels:
                if steps % 9 == 0:  # mostly to where the pool is small
                    goal = rng.choice((0, 0, 0, 1, rng.randrange(len(engine.parts.capacities))))
                engine.parts.shifter.target = goal  # asked again until there is room, as the controller does
            for key in [key for key in victims if key in told and rng.random() < 0.05]:
                victims.discard(key)
                engine.cancel(key)
            out = engine.step(decide=False)
            for key in out.started if out else ():
                told[key].started += 1
            for delta in out.tokens if out else ():
                assert not told[delta.key].ends, "a token after the end"
                told[delta.key].tokens += delta.tokens
                told[delta.key].logprobs += delta.logprobs
            for end in out.finished if out else ():
                told[end.key].ends.append(end.reason)
        engine.check_integrity()
        assert engine.parts.pool.num_used == 0
        assert engine.step(decide=False) is None
        return told


def overlapped(engine: Engine, twice: bool = False) -> tuple[Engine, LateRunner]:
    """The same engine with steps that run as late as can be."""
    runner = LateRunner.of(engine.parts, twice)
    config = replace(engine.parts.config, overlap="on")
    return Engine(replace(engine.parts, runner=runner, config=config)), runner


def same(alone: dict[int, Told], late: dict[int, Told]) -> None:
    """Requests end once, for the same reason, with the same tokens; a cancelled one may have come further."""
    assert alone.keys() == late.keys()
    for key, one in alone.items():
        other = late[key]
        assert len(one.ends) == len(other.ends) == 1
        assert other.started <= 1
        if "cancelled" in one.ends + other.ends:
            length = min(len(one.tokens), len(other.tokens))
            assert one.tokens[:length] == other.tokens[:length]
        else:
            assert (one.ends, one.tokens) == (other.ends, other.tokens), key
            assert [entry.ids for entry in one.logprobs] == [entry.ids for entry in other.logprobs]


SIZES = {
    "roomy": {"kv_tokens": 1024},
    "tiny pool": {"kv_tokens": 160},
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix cache", "no prefix cache"])
@pytest.mark.parametrize("size", SIZES)
def test_late_steps_give_the_same_tokens(
    folder: Path, engines: EngineFactory, seed: int, prefix: bool, size: str
) -> None:
    load = Load(seed, KINDS)
    settings = {"memory": SIZES[size], "cache": {"prefix": prefix}}
    alone = load.run(engines(folder, **settings))
    engine, runner = overlapped(engines(folder, **settings))
    same(alone, load.run(engine))
    assert runner.overlapped > runner.launches // 2, "the test must overlap"
    assert size == "roomy" or engine.parts.scheduler.preemptions > 0, "the test must preempt"


@pytest.mark.parametrize("seed", range(2))
def test_rows_that_need_the_values_of_earlier_tokens_wait_for_them(
    folder: Path, engines: EngineFactory, seed: int
) -> None:
    load = Load(seed, (*KINDS, *KINDS_WITH_VALUES), cancels=False)
    settings = {"memory": {"kv_tokens": 160}}
    alone = load.run(engines(folder, **settings))
    engine, runner = overlapped(engines(folder, **settings))
    same(alone, load.run(engine))
    assert 0 < runner.overlapped < runner.launches, "some steps overlap, some wait"
    assert engine.parts.scheduler.preemptions > 0, "the test must preempt"


@pytest.mark.parametrize("reuse", ["exact", "any"])
def test_levels_change_and_blocks_move_between_steps_that_are_in_flight(
    folder: Path, engines: EngineFactory, reuse: str
) -> None:
    settings = {"memory": {"kv_tokens": 160}, "morph": {"ladder": ["w8", "w4"]}, "cache": {"reuse": reuse}}
    engine, runner = overlapped(engines(folder, **settings), twice=True)
    told = Load(3, KINDS, count=60).run(engine, levels=True)
    assert all(len(one.ends) == 1 for one in told.values())
    assert runner.overlapped > runner.launches // 2, "the test must overlap"
    assert engine.parts.shifter.counters.up > 3 and engine.parts.resizer.blocks_migrated > 0, "the test must migrate"
    assert engine.parts.scheduler.preemptions > 0, "the test must preempt"


def test_starts_are_told_once_and_before_the_step_in_flight_is_waited_for(folder: Path, engines: EngineFactory) -> None:
    engine, runner = overlapped(engines(folder))
    heard: list[tuple[list[int], int]] = []
    engine.tell_starts(lambda out: heard.append((out.started, len(runner.unresolved))))
    submit(engine, 1, [5, 9, 23], 8)
    first = engine.step(decide=False)
    assert first is not None and first.started == [1] and not heard, "nothing was in flight"
    submit(engine, 2, [7, 9, 23], 8)
    second = engine.step(decide=False)
    assert second is not None and not second.started
    assert heard == [([2], 2)], "told while the first step still ran"
    assert {key: len(tokens) for key, tokens in run_all(engine).items()} == {1: 7, 2: 8}
    assert len(heard) == 1
