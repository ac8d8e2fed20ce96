"""The service with the deterministic engine, in one process."""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from fake_engine import CACHED_TOKENS, SEED_CRASH, SEED_FAIL, FakeEngine
from morph_backend.control import ControlFolder
from morph_backend.inputs import read_request
from morph_backend.lifecycle import DrainDuty, ParentWatch
from morph_backend.recorder import MetricsRecorder
from morph_backend.senders import SenderPool
from morph_backend.service import SHUTTING_DOWN, Service
from morph_backend.vocabulary import spell_bad_words
from morph_runtime.config import EngineConfig
from morph_runtime.engine.messages import Finished, QueueSignal, SamplingParams, StepOutput, Submit, TokenDelta
from morph_runtime.text.tokenizer import Tokenizer
from tiny_model import tiny_tokenizer


class House:
    def __init__(self, make_sender: Any, make_request: Any, **settings: Any) -> None:
        self.recorder = MetricsRecorder()
        self.service = Service(Tokenizer(tiny_tokenizer()), self.recorder, line=2, **settings)
        config = EngineConfig.from_mapping({"scheduler": {"max_num_seqs": 2}})
        self.engine = FakeEngine(config, self.service)
        self.engine.step_s = 0.002
        self.service.attach(self.engine, self.engine.start())
        self._make_sender, self._make_request = make_sender, make_request

    def ask(self, sampling: str = "{}", text: str = "hello world", **inputs: Any) -> Any:
        """Handle a request in this thread; returns its sender."""
        sender = self._make_sender()
        request = self._make_request(
            text_input=text, sampling_parameters=sampling, exclude_input_in_output=True, **inputs
        )
        self.service.handle(sender, functools.partial(read_request, request))
        return sender

    def freeze(self) -> None:
        """End the engine's own steps; the test speaks for it from now on."""
        self.engine._stop.set()
        self.engine._thread.join()
        self.engine._stop.clear()

    def ask_in_thread(self, *arguments: Any, **inputs: Any) -> tuple[threading.Thread, list[Any]]:
        senders: list[Any] = []
        thread = threading.Thread(target=lambda: senders.append(self.ask(*arguments, **inputs)), daemon=True)
        thread.start()
        return thread, senders

    def counts(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        return {labels: value for (n, labels), value in self.recorder.take().counts.items() if n == name and value}


@pytest.fixture
def house(make_sender: Any, make_request: Any) -> Iterator[House]:
    house = House(make_sender, make_request)
    yield house
    house.service.close()


def finished(sender: Any) -> Any:
    assert sender.done.wait(60)
    assert (sender.finals, sender.misuse) == (1, [])
    return sender


def until(condition: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_gets_its_text(house: House, stream: bool) -> None:
    house.engine.held.set()
    sender = house.ask('{"max_tokens": 20}', stream=stream)
    house.engine.release_when(lambda: sender.responses or not stream)
    assert finished(sender).text.startswith("hello worldhello")
    assert len(sender.responses) > 1 if stream else len(sender.responses) == 1
    until(lambda: house.service.num_open == 0)
    until(lambda: house.counts("morph_requests_total") == {(("outcome", "length"),): 1})


def test_a_request_learns_how_much_of_its_prompt_was_cached(house: House) -> None:
    sender = finished(house.ask('{"max_tokens": 5}', return_num_cached_tokens=True))
    assert sender.responses[-1].outputs["num_cached_tokens"].tolist() == [CACHED_TOKENS]


def test_bad_input_is_refused_before_any_credit(house: House) -> None:
    house.freeze()
    for _ in range(2):
        house.ask('{"max_tokens": 400}')  # the credits are gone, and nothing gives one back
    sender = finished(house.ask('{"max_tokens": -2}'))
    assert sender.error.code == "INVALID_ARG" and "max_tokens" in str(sender.error)


def test_a_defect_while_reading_is_an_internal_error(house: House, sender: Any) -> None:
    def broken(_limits: Any) -> Any:
        raise ZeroDivisionError("oops")

    house.service.handle(sender, broken)
    assert finished(sender).error.code == "INTERNAL" and "oops" in str(sender.error)


def test_the_engines_line_is_short(house: House) -> None:
    threads = [house.ask_in_thread('{"max_tokens": 100}')[0] for _ in range(9)]
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, len(house.engine._waiting))
        time.sleep(0.001)
    assert most <= 2


def test_a_stop_string_ends_the_engines_work(house: House) -> None:
    sender = finished(house.ask('{"max_tokens": 400, "stop": ["world"]}', stream=True))
    assert sender.text == "hello "
    until(lambda: house.engine.cancelled == [1] and not house.engine._running)


def test_a_cancelled_request_ends_with_an_error_and_frees_the_engine(house: House) -> None:
    house.engine.held.set()
    sender = house.ask('{"max_tokens": 400}', stream=True)
    until(lambda: sender.responses)
    sender.cancelled = True
    house.service.poll()
    assert finished(sender).error.code == "CANCELLED" and str(sender.error) == "Request was cancelled"
    until(lambda: not house.engine._running)
    assert house.service.num_open == 0


def test_cancelled_while_waiting_for_a_credit(house: House, make_sender: Any, make_request: Any) -> None:
    house.engine.held.set()
    senders = [make_sender() for _ in range(5)]
    read = functools.partial(read_request, make_request(text_input="hi", sampling_parameters='{"max_tokens": 400}'))

    def serve() -> None:
        for sender in senders:
            house.service.handle(sender, read)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    until(lambda: len(house.engine.submitted) == 4 and house.service.held == 1)
    senders[4].cancelled = True
    house.service.poll()
    thread.join(60)
    assert not thread.is_alive() and senders[4].error.code == "CANCELLED"
    assert len(house.engine.submitted) == 4 and house.service.num_open == 4


def test_a_request_that_takes_too_long(make_sender: Any, make_request: Any) -> None:
    house = House(make_sender, make_request, max_request_s=0.05)
    house.engine.held.set()
    sender = house.ask('{"max_tokens": 400}')
    time.sleep(0.1)
    house.service.poll()
    assert "took longer than max_request_seconds, 0.05 s" in str(finished(sender).error)
    house.service.close()


def test_an_engine_error_reaches_its_request_alone(house: House) -> None:
    good = house.ask('{"max_tokens": 40}')
    bad = finished(house.ask(f'{{"seed": {SEED_FAIL}}}'))
    assert bad.error.code == "INTERNAL" and str(bad.error) == "it went wrong"
    assert finished(good).error is None


def test_a_dead_engine_ends_all_and_refuses_more(house: House) -> None:
    house.engine.held.set()
    open_ones = [house.ask('{"max_tokens": 400}', stream=True) for _ in range(2)]
    for sender in open_ones:
        until(lambda s=sender: s.responses)
    house.engine.config = EngineConfig.from_mapping({"scheduler": {"max_num_seqs": 3}})
    open_ones.append(house.ask(f'{{"seed": {SEED_CRASH}}}'))
    for sender in open_ones[:2]:
        assert finished(sender).error.code == "UNAVAILABLE"
    assert not house.service.healthy
    late = finished(house.ask("{}"))
    assert late.error.code == "UNAVAILABLE" and "unhealthy vLLM engine" in str(late.error)


def test_a_dead_engine_wakes_who_waits_for_a_credit(house: House) -> None:
    house.engine.held.set()
    for _ in range(4):
        house.ask('{"max_tokens": 400}')
    thread, senders = house.ask_in_thread()
    until(lambda: house.service.held == 1)
    house.service.on_down("it fell over")
    thread.join(60)
    assert finished(senders[0]).error.code == "UNAVAILABLE"


def test_a_response_that_cannot_be_sent_ends_its_request_alone(house: House, make_sender: Any) -> None:
    good = house.ask('{"max_tokens": 60}', stream=True)
    broken = make_sender()
    broken.broken = True
    house._make_sender = lambda: broken
    house.ask('{"max_tokens": 400}', stream=True)
    assert "could not be sent" in str(finished(broken).error)
    assert finished(good).error is None
    until(lambda: not house.engine._running)


def test_the_end_is_in_the_inbox_when_its_request_is_woken(house: House) -> None:
    """FINAL rides on the last text only if the sender thread finds both at once."""
    house.engine.held.set()
    senders = [house.ask('{"max_tokens": 400}') for _ in range(2)]
    woken: list[tuple[int, list[str]]] = []

    class Recording:
        def wake(self, request: Any) -> None:
            woken.append((request.key, [type(event).__name__ for event in request.take()]))

        def close(self) -> None:
            pass

    house.freeze()
    house.service._senders.close()
    house.service._senders = Recording()  # type: ignore[assignment]
    for request in house.service._open.all():
        request.take()
    tokens = [TokenDelta(1, [5], [0]), TokenDelta(2, [6], [0])]
    house.service.on_step(StepOutput([], tokens, [Finished(2, "length"), Finished(1, "stop")], 0, 0))
    assert woken == [(1, ["Tokens", "End"]), (2, ["Tokens", "End"])]
    assert not any(sender.finals for sender in senders)


def test_a_failure_to_fail_does_not_end_the_sender_thread() -> None:
    done: list[int] = []

    def work(request: Any) -> None:
        if request.key == 1:
            raise RuntimeError("cannot send")
        done.append(request.key)

    def failed(_request: Any, _error: Exception) -> None:
        raise RuntimeError("cannot even say so")

    pool = SenderPool(1, work, failed)
    for key in (1, 2):
        pool.wake(SimpleNamespace(key=key, awaited=False))  # type: ignore[arg-type]
    pool.close()
    assert done == [2]


def test_news_that_come_while_a_request_is_being_sent_wake_its_thread_once() -> None:
    looks: list[int] = []
    sending, go_on = threading.Event(), threading.Event()

    def work(_request: Any) -> None:
        looks.append(len(inbox))
        sending.set()
        assert go_on.wait(60)

    inbox: list[int] = []
    request: Any = SimpleNamespace(key=1, awaited=False)
    pool = SenderPool(1, work, lambda _request, _error: None)
    for news in range(5):
        inbox.append(news)
        pool.wake(request)
        assert sending.wait(60)  # the first one is being sent while the others come
    go_on.set()
    pool.close()
    assert looks == [1, 5]


def test_a_token_beyond_the_vocabulary_is_the_requests_fault(house: House) -> None:
    house.service.attach(house.engine, msgspec.structs.replace(house.service._info, vocab_size=100))
    sender = finished(house.ask(text="hello world"))
    assert sender.error.code == "INVALID_ARG"
    assert re.fullmatch(
        r"text_input: has the token \d+, but the model's vocabulary ends at 99: leave it out\.", str(sender.error)
    )
    assert house.engine.submitted == [] and house.service.num_open == 0


def test_a_bad_word_beyond_the_vocabulary_is_left_out(house: House) -> None:
    spelt = SamplingParams(bad_words=("hello",))
    tokenizer = Tokenizer(tiny_tokenizer())
    assert spell_bad_words(spelt, tokenizer, 320).bad_word_ids
    assert spell_bad_words(spelt, tokenizer, 2).bad_word_ids == ()


def test_the_engines_end_is_told_after_the_streams_are_told(make_sender: Any, make_request: Any) -> None:
    told: list[str] = []
    house = House(make_sender, make_request, on_gone=told.append)
    sender = house.ask('{"max_tokens": 400}')
    house.service.on_down("it fell over")
    assert told == ["it fell over"]
    assert finished(sender).error.code == "UNAVAILABLE"
    house.service.close()
    assert told == ["it fell over"]


def test_ends_during_a_restart_give_back_their_credits_and_let_in_nobody_else(house: House) -> None:
    house.freeze()
    threads = [house.ask_in_thread('{"max_tokens": 5}')[0] for _ in range(2)]
    until(lambda: len(house.engine.submitted) == 2)
    house.service.on_restarting("it fell over")
    threads += [house.ask_in_thread('{"max_tokens": 5}')[0] for _ in range(2)]
    until(lambda: house.service.held == 2)
    house.recorder.take()
    ended = house.engine.submitted[0].key
    house.service.on_step(StepOutput([], [], [Finished(ended, "cancelled")], 0, 0, from_engine=False))
    until(lambda: len(house.engine.submitted) == 3)
    admission = house.service._admission
    assert admission._news.short_of_blocks and house.service.held == 1
    assert not any("requests" in name for name, _ in house.recorder.take().gauges)


@pytest.mark.parametrize("moment", ["before the first output", "between two outputs"])
@pytest.mark.parametrize("why", ["its client has gone", "the drain is over"])
def test_a_request_that_ends_while_it_is_handed_over_is_no_work_for_the_engine(
    house: House, make_sender: Any, make_request: Any, monkeypatch: pytest.MonkeyPatch, moment: str, why: str
) -> None:
    house.engine.held.set()  # nothing but a cancellation ends it
    sender = make_sender()

    def end() -> None:
        if sender.finals:
            return
        if why == "its client has gone":
            sender.cancelled = True
            house.service.poll()
        else:
            house.service.abort(SHUTTING_DOWN)

    def spell(*given: Any) -> SamplingParams:
        if moment == "before the first output":
            end()
        return spell_bad_words(*given)

    def submit(message: Submit) -> None:
        if message.after and moment == "between two outputs":
            end()
        house.engine.__class__.submit(house.engine, message)

    monkeypatch.setattr("morph_backend.service.spell_bad_words", spell)
    monkeypatch.setattr(house.engine, "submit", submit)
    request = make_request(text_input="hello", sampling_parameters='{"max_tokens": 400, "n": 2}')
    house.service.handle(sender, functools.partial(read_request, request))
    assert finished(sender).error is not None
    until(lambda: not house.engine._waiting and not house.engine._running)
    house.engine.held.clear()
    assert finished(house.ask('{"max_tokens": 4, "n": 2}')).error is None, "the credits are back"


def test_what_the_engine_says_after_the_last_word_makes_the_server_look_no_better(
    house: House,
) -> None:
    house.freeze()
    house.service.on_down("Triton has not taken a response for 60 s; its front end hangs.")
    assert house.recorder.take().gauges["morph_engine_up", ()] == 0
    house.service.on_step(StepOutput([], [], [], 0, 0))
    house.service.on_stats(house.engine._stats())
    house.service.poll()
    house.service.on_restarting("somebody has killed it")
    house.service.poll()
    house.service.on_restarted()
    later = house.recorder.take().gauges
    assert ("morph_engine_heartbeat_seconds", ()) not in later and later.get(("morph_engine_up", ()), 0) == 0
    assert not house.service.healthy


def test_unknown_keys_and_odd_messages_do_no_harm(house: House) -> None:
    house.service.on_step(StepOutput([77], [TokenDelta(77, [1], [0])], [Finished(77, "stop")], 0, 0))
    house.engine.held.set()
    sender = house.ask('{"max_tokens": 300}', return_morph_level=True)
    house.service.on_step(StepOutput([], [TokenDelta(1, [], []), TokenDelta(1, [5, 6], [])], [], 0, 0))
    house.service.on_step(StepOutput([], [], [Finished(1, "length")], 0, 0))
    assert len(finished(sender).responses[-1].outputs["morph_level"]) >= 2


def test_tokens_that_are_no_tokens_end_their_request(house: House) -> None:
    house.engine.held.set()
    sender = house.ask('{"max_tokens": 300}')
    house.service.on_step(StepOutput([], [TokenDelta(1, [-5], [0])], [], 0, 0))
    assert finished(sender).error.code == "INTERNAL"


def test_the_queue_signal_is_passed_on(house: House) -> None:
    signal = QueueSignal(taken_s=1.0, pending=3)
    house.service.publish_queue(signal)
    assert house.engine.signals == [signal]


def test_closing_ends_what_is_open(house: House) -> None:
    house.engine.held.set()
    sender = house.ask('{"max_tokens": 400}', stream=True)
    house.service.close()
    assert str(finished(sender).error) == SHUTTING_DOWN
    assert str(finished(house.ask()).error) == SHUTTING_DOWN


def test_a_drain_lets_open_requests_end(house: House, tmp_path: Any) -> None:
    control = ControlFolder(tmp_path)
    duty = DrainDuty(house.service, control)
    duty()
    house.engine.held.set()
    sender = house.ask('{"max_tokens": 50}')
    control.ask_drain(600)
    duty()
    assert str(finished(house.ask()).error) == SHUTTING_DOWN
    assert control.heard("drained") is None
    house.engine.held.clear()
    assert finished(sender).error is None
    until(lambda: house.service.num_open == 0)
    duty()
    assert control.heard("drained") == ""


def test_a_drain_has_a_deadline(house: House, tmp_path: Any) -> None:
    control = ControlFolder(tmp_path)
    house.engine.held.set()
    sender = house.ask('{"max_tokens": 500}')
    control.ask_drain(0)
    DrainDuty(house.service, control)()
    assert str(finished(sender).error) == SHUTTING_DOWN
    assert control.heard("drained") == ""


def test_the_parents_death_ends_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    looked, left = threading.Event(), threading.Event()
    parents = [4711, 4711, 4711]

    def parent() -> int:
        if len(parents) == 1:
            looked.set()
        return parents.pop() if parents else 1

    def leave(status: int) -> None:
        done.append(status)
        left.set()

    monkeypatch.setattr("os.getppid", parent)
    watch = ParentWatch(leave, interval_s=0.001)
    assert parents == [4711, 4711], "whose child it is must be known before anything takes time"
    watch.start()
    assert looked.wait(60) and left.wait(60)
    watch.close()
    assert done == [1]
