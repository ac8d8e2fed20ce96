"""An engine process that ends, hangs or does not start costs its requests time, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.conftest import make_model
from engine.test_process import Recorder, config_for
from morph_runtime.config import EngineConfig
from morph_runtime.engine.client import EngineClient, EngineListener
from morph_runtime.engine.handle import KeeperSettings
from morph_runtime.engine.keeper import EngineKeeper
from morph_runtime.engine.messages import EngineInfo, SamplingParams, StepOutput, StructuredOutputs, Submit
from morph_runtime.engine.patience import IN_ALL_FACTOR
from morph_runtime.errors import EngineDown

FAST = KeeperSettings(restarts=3, pause_s=0.01, start_timeout_s=110)
LONG = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
CASES = {
    "greedy": LONG,
    "seeded": SamplingParams(max_tokens=150, seed=7, temperature=1.3, top_p=0.95, ignore_eos=True),
    "penalties": SamplingParams(
        max_tokens=150, temperature=0.0, ignore_eos=True, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2,
    ),
    "bad words": SamplingParams(max_tokens=150, seed=3, bad_word_ids=((5, 6), (9,)), ignore_eos=True),
    "min_tokens": SamplingParams(max_tokens=150, seed=11, temperature=1.5, min_tokens=120),
    "log probabilities": SamplingParams(
        max_tokens=150, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=2
    ),
    "structured": SamplingParams(
        max_tokens=150, seed=5, structured_outputs=StructuredOutputs("regex", "([a-z]{3}-[0-9]{2} ){30}")
    ),
}  # fmt: skip


class Hearer(Recorder):
    """Remembers log probabilities, starts and restarts too."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: dict[int, list[object]] = {}
        self.prompt_scores: dict[int, list[object]] = {}
        self.started: list[int] = []
        self.restarting: list[str] = []
        self.restarted = 0
        self.details: dict[int, str] = {}

    def on_step(self, out: StepOutput) -> None:
        self.started += out.started
        for delta in out.tokens:
            self.scores.setdefault(delta.key, []).extend(delta.logprobs)
            self.prompt_scores.setdefault(delta.key, []).extend(delta.prompt_logprobs)
        self.details.update({end.key: end.detail for end in out.finished})
        super().on_step(out)

    def on_restarting(self, reason: str) -> None:
        with self.condition:
            self.restarting.append(reason)
            self.condition.notify_all()

    def on_restarted(self) -> None:
        with self.condition:
            self.restarted += 1
            self.condition.notify_all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("model"), kv_heads=2, vocab=300)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"})
    )
    return folder


class Keeping:
    """A keeper of real engine processes."""

    def __init__(
        self,
        config: EngineConfig,
        settings: KeeperSettings = FAST,
        cases: Mapping[str, SamplingParams] = CASES,
        python: str = sys.executable,
    ) -> None:
        self.hearer = Hearer()
        self.clients: list[EngineClient] = []
        self._config, self._cases, self._python = config, cases, python
        self.keeper = EngineKeeper(self._make, self.hearer, settings)
        self.keeper.start(settings.start_timeout_s)

    def _make(self, listener: EngineListener) -> EngineClient:
        self.clients.append(EngineClient(self._config, listener, python=self._python))
        return self.clients[-1]

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.clients[-1].pid, number)

    def serve(self, disturb: Callable[[int], bool] = lambda _tokens: False) -> None:
        """Run all cases; `disturb` is told the number of tokens so far and says whether it has just struck."""
        for key, sampling in enumerate(self._cases.values()):
            self.keeper.submit(Submit(key=key, prompt=[3, 1, 4, 1, 5, 9, 2, 6, key + 1], sampling=sampling))
        restarts, hearer = 0, self.hearer
        while True:
            seen = sum(map(len, hearer.tokens.values()))
            if disturb(seen):  # on a busy machine perhaps only when all is over; it is survived then too
                restarts += 1
                hearer.wait(lambda wanted=restarts: hearer.restarted == wanted)
            elif len(hearer.finished) == len(self._cases):
                return
            else:
                hearer.wait(
                    lambda seen=seen: (
                        sum(map(len, hearer.tokens.values())) > seen or len(hearer.finished) == len(self._cases)
                    )
                )


@pytest.fixture
def keeping(folder: Path) -> Iterator[Callable[..., Keeping]]:
    made: list[Keeping] = []

    def make(overlap: str = "off", settings: KeeperSettings = FAST) -> Keeping:
        made.append(Keeping(config_for(folder, overlap, kv_tokens=2048), settings))
        return made[-1]

    yield make
    for each in made:
        each.keeper.close()


@pytest.fixture(scope="module")
def calm(folder: Path) -> Hearer:
    """What an undisturbed run says."""
    undisturbed = Keeping(config_for(folder, "off", kv_tokens=2048))
    try:
        undisturbed.serve()
    finally:
        undisturbed.keeper.close()
    return undisturbed.hearer


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_tokens_after_kills_are_those_of_an_undisturbed_run(
    keeping: Callable[..., Keeping], calm: Hearer, overlap: str
) -> None:
    stormy = keeping(overlap)
    strikes = [60, 250, 450]

    def strike(tokens: int) -> bool:
        if not strikes or tokens < strikes[0]:
            return False
        strikes.pop(0)
        stormy.kill()
        return True

    stormy.serve(strike)
    assert not strikes and stormy.hearer.restarted == 3
    names = dict(enumerate(CASES))
    assert {names[k]: t for k, t in stormy.hearer.tokens.items()} == {names[k]: t for k, t in calm.tokens.items()}
    assert stormy.hearer.finished == calm.finished
    assert set(calm.finished.values()) == {"length", "stop"}
    assert sorted(stormy.hearer.started) == sorted(set(stormy.hearer.started)), "a credit is given back once"
    at = list(CASES).index("log probabilities")
    ours, theirs = stormy.hearer.scores[at], calm.scores[at]
    assert len(ours) == len(theirs) == 150
    assert [(s.rank, s.ids) for s in ours] == [(s.rank, s.ids) for s in theirs]
    assert [s.values for s in ours] == [pytest.approx(s.values, abs=1e-4) for s in theirs]
    assert len(stormy.hearer.prompt_scores[at]) == 8
    assert stormy.hearer.down == []


def test_a_segfault_is_survived_and_its_suspects_are_cleared(keeping: Callable[..., Keeping], calm: Hearer) -> None:
    stormy = keeping()
    strikes = [300]

    def strike(tokens: int) -> bool:
        if not strikes or tokens < strikes[0]:
            return False
        strikes.pop()
        stormy.kill(signal.SIGSEGV)
        return True

    stormy.serve(strike)
    assert stormy.hearer.tokens == calm.tokens and stormy.hearer.finished == calm.finished


def test_a_stopped_engine_is_noticed_and_replaced(keeping: Callable[..., Keeping]) -> None:
    settings = KeeperSettings(restarts=3, pause_s=0.01, silence_s=4, start_timeout_s=110)
    held = keeping(settings=settings)
    held.keeper.submit(Submit(key=1, prompt=[1, 2], sampling=LONG))
    held.hearer.wait(lambda: held.hearer.tokens.get(1))
    held.kill(signal.SIGSTOP)
    held.keeper.submit(Submit(key=2, prompt=[1, 2], sampling=LONG))  # only who has requests has to answer
    held.hearer.wait(lambda: held.hearer.finished == {1: "length", 2: "length"})
    assert held.hearer.restarting == ["It did not answer for 4 s."]
    assert held.hearer.tokens[1] == held.hearer.tokens[2] and len(held.hearer.tokens[1]) == 150


def test_a_short_pause_is_no_crash(keeping: Callable[..., Keeping]) -> None:
    held = keeping(settings=KeeperSettings(silence_s=100))
    held.keeper.submit(Submit(key=1, prompt=[1, 2], sampling=LONG))
    held.hearer.wait(lambda: held.hearer.tokens.get(1))
    held.kill(signal.SIGSTOP)
    timer = threading.Timer(1.0, held.kill, [signal.SIGCONT])
    timer.start()
    held.hearer.wait(lambda: held.hearer.finished.get(1) == "length")
    assert held.hearer.restarting == []


def test_what_came_during_a_restart_is_served_and_what_was_cancelled_is_acknowledged(
    keeping: Callable[..., Keeping],
) -> None:
    held = keeping()
    held.keeper.submit(Submit(key=1, prompt=[1, 2], sampling=LONG))
    held.hearer.wait(lambda: held.hearer.tokens.get(1))
    held.kill()
    held.hearer.wait(lambda: held.hearer.restarting)
    held.keeper.submit(Submit(key=2, prompt=[3, 4], sampling=LONG))
    held.keeper.submit(Submit(key=3, prompt=[3, 4], sampling=LONG))
    held.keeper.cancel(3)
    assert held.hearer.finished[3] == "cancelled"
    held.hearer.wait(lambda: len(held.hearer.finished) == 3)
    assert 3 not in held.hearer.tokens and len(held.hearer.tokens[2]) == 150


class Broken:
    """A handle whose engine starts, or does not: then it has failed of itself, or somebody has ended it."""

    def __init__(self, listener: EngineListener, failure: str, outside: bool) -> None:
        self.listener, self._failure = listener, failure
        self.ended_from_outside = outside

    def start(self, timeout_s: float = 0.0) -> EngineInfo:
        if self._failure:
            raise EngineDown(self._failure)
        return None  # type: ignore[return-value]

    def submit(self, request: Submit) -> None: ...
    def cancel(self, key: int) -> None: ...
    def kill(self) -> None: ...
    def close(self, drain_s: float = 0.0) -> None: ...


class Failing:
    """A keeper whose first engine starts and is killed; `fails` says of each later start, counted from 1, whether it
    is `ended` from outside, is `bad`, or goes well (empty text)."""

    def __init__(self, fails: Callable[[int], str]) -> None:
        self.hearer = Hearer()
        self._fails, self._handles = fails, list[Broken]()
        settings = KeeperSettings(restarts=FAST.restarts, pause_s=0.0)
        self.keeper = EngineKeeper(self._make, self.hearer, settings)  # type: ignore[arg-type]
        self.keeper.start()
        self.keeper.submit(Submit(key=1, prompt=[1], sampling=LONG))
        self._handles[0].listener.on_down("killed")

    @property
    def made(self) -> int:
        return len(self._handles)

    def _make(self, listener: EngineListener) -> Broken:
        how = self._fails(self.made) if self.made else ""
        failure = how and f"No luck ({how}), attempt {self.made}."
        self._handles.append(Broken(listener, failure, outside=how != "bad"))
        return self._handles[-1]


def test_an_engine_that_does_not_come_back_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing(lambda _at: "bad")
    failing.hearer.wait(lambda: failing.hearer.down)
    assert failing.hearer.down == ["No luck (bad), attempt 3."] and failing.made == 1 + FAST.restarts
    assert "given up: 3 starts in a row have come to nothing" in caplog.text
    with pytest.raises(EngineDown, match="attempt 3"):
        failing.keeper.submit(Submit(key=2, prompt=[1], sampling=LONG))
    failing.keeper.close()


def test_engines_that_are_ended_while_they_start_do_not_end_the_server() -> None:
    failing = Failing(lambda at: "ended" if at <= 2 * FAST.restarts else "")
    failing.hearer.wait(lambda: failing.hearer.restarted)
    assert failing.hearer.down == [] and failing.made == 2 + 2 * FAST.restarts
    failing.keeper.close()


def test_engines_that_are_always_ended_while_they_start_are_given_up_in_the_end() -> None:
    failing = Failing(lambda _at: "ended")
    failing.hearer.wait(lambda: failing.hearer.down)
    assert failing.made == 1 + FAST.restarts * IN_ALL_FACTOR
    failing.keeper.close()


def test_an_engine_that_fails_of_itself_between_kills_is_given_up_as_soon() -> None:
    failing = Failing(lambda at: "bad" if at % 2 else "ended")
    failing.hearer.wait(lambda: failing.hearer.down)
    assert failing.hearer.down == ["No luck (bad), attempt 5."]
    failing.keeper.close()


def test_an_engine_that_is_being_restarted_can_be_closed(folder: Path, keeping: Callable[..., Keeping]) -> None:
    held = keeping()
    held.kill()
    held.hearer.wait(lambda: held.hearer.restarting)
    held.keeper.close()
    assert all(client._process is None or client._process.poll() is not None for client in held.clients)
    assert held.hearer.down == []
