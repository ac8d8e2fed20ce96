"""What outlives the engine: tokens are told once, in order, and only a request that kills alone is given up."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morph_runtime.engine.kept import POISON, TRIAL_TOKENS, KeptRequests
from morph_runtime.engine.messages import Cancel, Finished, SamplingParams, StepOutput, Submit, TokenDelta


@dataclass
class Model:
    """An engine that gives request `key` the tokens 1000 * key + 0, 1, 2, ...; keys in `poison` end it at a token."""

    poison: dict[int, int] = field(default_factory=dict)
    running: dict[int, int] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)
    acks: list[int] = field(default_factory=list)
    seen: list[Submit | Cancel] = field(default_factory=list)

    def take(self, message: Submit | Cancel) -> None:
        self.seen.append(message)
        if isinstance(message, Submit):
            assert message.key not in self.running, "it is in the engine already"
            self.running[message.key] = len(message.resumed)
            self.limits[message.key] = message.sampling.max_tokens
        elif self.running.pop(message.key, None) is not None:
            self.acks.append(message.key)

    def step(self) -> StepOutput | None:
        """None if it has died of a request."""
        tokens, finished = [], [Finished(key, "cancelled") for key in self.acks]
        self.acks = []
        for key, at in list(self.running.items()):
            if self.poison.get(key) == at:
                return None
            tokens.append(TokenDelta(key, [1000 * key + at], [0]))
            self.running[key] = at + 1
            if at + 1 == self.limits[key]:
                del self.running[key]
                finished.append(Finished(key, "length"))
        return StepOutput(list(self.running), tokens, finished, 0, len(self.running), [0] * len(self.running))

    def reset(self) -> None:
        self.running, self.acks = {}, []


class Client:
    """The serving process: checks what it is told."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Finished] = {}
        self.started: list[int] = []

    def hear(self, out: StepOutput) -> None:
        assert len(out.started) == len(out.started_cached)
        self.started += out.started
        for delta in out.tokens:
            assert delta.key not in self.ends, "a token after the end"
            self.tokens.setdefault(delta.key, []).extend(delta.tokens)
        self.end(out.finished)

    def end(self, finished: list[Finished]) -> None:
        for end in finished:
            assert end.key not in self.ends, "two ends"
            self.ends[end.key] = end


def submit(key: int, tokens: int) -> Submit:
    return Submit(key=key, prompt=[key], sampling=SamplingParams(max_tokens=tokens))


def play(engine: Model, kept: KeptRequests, client: Client, steps: int = 10_000) -> int:
    """Step until nothing is left, restarting after each death; the number of deaths."""
    deaths = 0
    for _ in range(steps):
        if not len(kept):
            return deaths
        out = engine.step()
        if out is not None:
            client.hear(kept.step(out))
            continue
        deaths += 1
        engine.reset()
        client.end(kept.crashed(own_fault=True))
        kept.admit()
    raise AssertionError("requests are left")


@pytest.fixture
def engine() -> Model:
    return Model()


def test_after_an_end_from_outside_all_go_on_where_they_were(engine: Model) -> None:
    kept, client = KeptRequests(engine.take), Client()
    for key in (1, 2, 3):
        kept.add(submit(key, 10))
    kept.admit()
    for _ in range(4):
        client.hear(kept.step(engine.step()))
    engine.reset()
    assert kept.crashed(own_fault=False) == []
    kept.admit()
    assert [m.resumed for m in engine.seen[3:]] == [[1000 * key + at for at in range(4)] for key in (1, 2, 3)]
    assert play(engine, kept, client) == 0
    assert client.tokens == {key: [1000 * key + at for at in range(10)] for key in (1, 2, 3)}
    assert sorted(client.started) == [1, 2, 3], "a credit is given back once"


def test_only_the_request_that_kills_is_ended(engine: Model) -> None:
    kept, client = KeptRequests(engine.take), Client()
    engine.poison = {4: 6}
    for key in range(1, 8):
        kept.add(submit(key, 20))
    kept.admit()
    assert play(engine, kept, client) == 2
    assert client.ends.pop(4) == Finished(4, "error", POISON)
    assert {end.reason for end in client.ends.values()} == {"length"}
    assert all(client.tokens[key] == [1000 * key + at for at in range(20)] for key in client.ends)


def test_a_defect_that_does_not_come_again_ends_nobody(engine: Model) -> None:
    kept, client = KeptRequests(engine.take), Client()
    kept.add(submit(1, 10))
    kept.admit()
    client.hear(kept.step(engine.step()))
    engine.reset()
    assert kept.crashed(own_fault=True) == []
    kept.admit()
    assert play(engine, kept, client) == 0
    assert client.tokens[1] == [1000 + at for at in range(10)]


def test_suspects_are_tried_one_at_a_time_and_newcomers_wait(engine: Model) -> None:
    kept, client = KeptRequests(engine.take), Client()
    for key in (1, 2, 3):
        kept.add(submit(key, 50))
    kept.admit()
    client.hear(kept.step(engine.step()))
    engine.reset()
    kept.crashed(own_fault=True)
    kept.admit()
    kept.add(submit(9, 5))
    kept.admit()
    company = set()
    while kept.num_suspects:
        company.add(tuple(engine.running))
        client.hear(kept.step(engine.step()))
    assert {len(alone) for alone in company} <= {0, 1} and 9 not in {key for alone in company for key in alone}
    assert set(engine.running) == {1, 2, 3, 9}
    assert len(client.tokens[1]) == 1 + TRIAL_TOKENS
    play(engine, kept, client)
    assert {end.reason for end in client.ends.values()} == {"length"}


def test_a_prompt_is_scored_once(engine: Model) -> None:
    kept = KeptRequests(engine.take)
    kept.add(Submit(key=1, prompt=[5, 6], sampling=SamplingParams(max_tokens=9, prompt_logprobs=2, logprobs=1)))
    kept.admit()
    engine.reset()
    kept.crashed(own_fault=False)
    kept.admit()
    assert engine.seen[-1].sampling.prompt_logprobs == 2, "nothing was told yet"
    kept.step(engine.step())
    engine.reset()
    kept.crashed(own_fault=False)
    kept.admit()
    assert engine.seen[-1].sampling.prompt_logprobs is None and engine.seen[-1].sampling.logprobs == 1


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(0, 2))
def test_whatever_happens_every_request_ends_once_with_its_own_tokens(seed: int, count: int, poisoned: int) -> None:
    dice = random.Random(seed)
    engine = Model()
    kept, client = KeptRequests(engine.take), Client()
    engine.poison = {key: dice.randrange(12) for key in dice.sample(range(1, count + 1), min(poisoned, count))}
    lengths = {key: dice.randint(1, 14) for key in range(1, count + 1)}
    coming, cancelled, up = list(lengths), set(), True
    for _ in range(4000):
        if not coming and not len(kept) and up:
            break
        what = dice.random()
        if what < 0.3 and coming:
            kept.add(submit(key := coming.pop(), lengths[key]))
            if up:
                kept.admit()
        elif what < 0.34:
            cancelled.add(key := dice.randint(1, count))
            if key not in coming:
                end = kept.cancel(key)
                client.end([end] if end else [])
                if up:
                    kept.admit()
        elif what < 0.38 and up:
            engine.reset()
            client.end(kept.crashed(own_fault=dice.random() < 0.5))
            up = False
        elif not up:
            kept.admit()
            up = True
        elif (out := engine.step()) is not None:
            client.hear(kept.step(out))
        else:
            engine.reset()
            client.end(kept.crashed(own_fault=True))
            up = False
    else:
        raise AssertionError("requests are left")
    assert set(client.ends) == set(lengths)
    for key, end in client.ends.items():
        told = client.tokens.get(key, [])
        assert told == [1000 * key + at for at in range(len(told))]
        assert end.reason != "length" or len(told) == lengths[key]
        assert end.reason != "cancelled" or key in cancelled
    assert len(client.started) == len(set(client.started))
