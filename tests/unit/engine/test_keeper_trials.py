"""Requests that end the engine are ended one by one, however many they are; the others lose time, and nothing else."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest

from engine.test_keeper import Hearer
from morph_runtime.engine.client import EngineListener
from morph_runtime.engine.handle import KeeperSettings
from morph_runtime.engine.keeper import STEADY_S, EngineKeeper
from morph_runtime.engine.kept import TRIAL_TOKENS
from morph_runtime.engine.messages import (
    EngineInfo,
    EngineStats,
    Finished,
    QueueSignal,
    SamplingParams,
    StepOutput,
    Submit,
    TokenDelta,
)
from morph_runtime.engine.patience import IN_ALL_FACTOR
from morph_runtime.errors import EngineDown

SAMPLING = SamplingParams(max_tokens=TRIAL_TOKENS)


class Engine:
    """A handle whose engine takes a request for each of `quiet` without a word; then each gets all its tokens in one
    step, or ends the engine before its first one if its key is `poison`."""

    def __init__(self, lab: Lab, listener: EngineListener, quiet: int) -> None:
        self.listener = listener
        self._lab, self._quiet, self._down = lab, quiet, False
        self.ended_from_outside = False
        self.taken: list[int] = []

    def start(self, timeout_s: float = 0.0) -> EngineInfo:
        assert self._lab.may_start.wait(100)
        return None  # type: ignore[return-value]

    def submit(self, request: Submit) -> None:
        if self._down:
            raise EngineDown("It is down.")
        self.taken.append(request.key)
        if len(self.taken) <= self._quiet:
            self._lab.tell()
        elif request.key in self._lab.poison:
            self._down = True
            self.listener.on_down(f"Request {request.key} was too much.")
        else:
            tokens = list(range(SAMPLING.max_tokens))
            delta = TokenDelta(request.key, tokens, [0] * len(tokens))
            self.listener.on_step(StepOutput([request.key], [delta], [Finished(request.key, "length")], 0, 0, [0]))

    def cancel(self, key: int) -> None: ...
    def publish_queue(self, signal: QueueSignal) -> None: ...
    def set_mode(self, mode: str = "", cap: float | None = None) -> None: ...
    def kill(self) -> None: ...

    def close(self, drain_s: float = 0.0) -> None:
        self._lab.on_close()


class Lab:
    """A keeper of such engines; the first takes `quiet` requests, which it then has until the test ends it."""

    def __init__(
        self,
        poison: set[int],
        quiet: int = 0,
        settings: KeeperSettings | None = None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.poison = poison
        self.hearer = Hearer()
        self.outs: list[StepOutput] = []
        self.engines: list[Engine] = []
        self.may_start = threading.Event()
        self.may_start.set()
        self.on_close: Callable[[], None] = lambda: None
        self._first_quiet = quiet
        on_step = self.hearer.on_step
        self.hearer.on_step = lambda out: (self.outs.append(out), on_step(out))  # type: ignore[assignment,func-returns-value]
        settings = settings or KeeperSettings(restarts=3, pause_s=0.0)
        self.keeper = EngineKeeper(self._make, self.hearer, settings, clock)
        self.keeper.start()

    def _make(self, listener: EngineListener) -> Engine:
        self.engines.append(Engine(self, listener, 0 if self.engines else self._first_quiet))
        return self.engines[-1]

    def tell(self) -> None:
        with self.hearer.condition:
            self.hearer.condition.notify_all()

    def submit(self, *keys: int) -> None:
        for key in keys:
            self.keeper.submit(Submit(key=key, prompt=[key], sampling=SAMPLING))

    def crash_with(self, *keys: int) -> None:
        """All of `keys` are in the first engine when it ends."""
        self.submit(*keys)
        self.hearer.wait(lambda: len(self.engines[0].taken) == len(keys))
        self.engines[0].listener.on_down("It fell over.")


@pytest.fixture
def lab() -> Iterator[Callable[..., Lab]]:
    made: list[Lab] = []

    def make(*arguments: object, **named: object) -> Lab:
        made.append(Lab(*arguments, **named))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.may_start.set()
        each.keeper.close()


def test_more_requests_that_end_the_engine_than_starts_may_fail_do_not_end_a_good_stream(
    lab: Callable[..., Lab],
) -> None:
    trial = lab({1, 2, 3, 4, 5}, quiet=6)
    trial.crash_with(*range(1, 7))
    trial.hearer.wait(lambda: len(trial.hearer.finished) == 6 or trial.hearer.down)
    assert trial.hearer.down == []
    assert trial.hearer.finished == {**dict.fromkeys(range(1, 6), "error"), 6: "length"}
    assert len(trial.engines) == 1 + 6, "one end of the engine that nobody is convicted of, and one for each of five"


def test_requests_that_end_the_engine_one_after_another_do_not_end_the_server(lab: Callable[..., Lab]) -> None:
    trial = lab({1, 2, 3, 4, 5})
    for key in trial.poison:
        trial.submit(key)
        trial.hearer.wait(lambda key=key: key in trial.hearer.finished or trial.hearer.down)
        assert trial.hearer.down == [] and trial.hearer.finished[key] == "error"
    trial.submit(6)
    trial.hearer.wait(lambda: trial.hearer.finished.get(6) == "length")


def test_an_engine_that_everything_ends_is_given_up(lab: Callable[..., Lab]) -> None:
    trial = lab(set(range(100)), quiet=50)
    trial.crash_with(*range(50))
    trial.hearer.wait(lambda: trial.hearer.down)
    assert len(trial.engines) == 1 + 3 * IN_ALL_FACTOR
    assert len(trial.hearer.finished) == 3 * IN_ALL_FACTOR


def test_a_cancelled_request_that_ends_the_engine_is_as_well_to_blame(lab: Callable[..., Lab]) -> None:
    trial = lab({1, 2, 3, 4, 5}, quiet=6)
    submit = Engine.submit

    def cancelled_meanwhile(engine: Engine, request: Submit) -> None:
        if engine is not trial.engines[0] and request.key in trial.poison:
            trial.keeper.cancel(request.key)
        submit(engine, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "submit", cancelled_meanwhile)
        trial.crash_with(*range(1, 7))
        trial.hearer.wait(lambda: len(trial.hearer.finished) == 6 or trial.hearer.down)
    assert trial.hearer.finished == {**dict.fromkeys(range(1, 6), "cancelled"), 6: "length"}


def test_ends_that_no_engine_has_told_say_nothing_of_what_it_runs(lab: Callable[..., Lab]) -> None:
    trial = lab(set(), quiet=2)
    trial.may_start.clear()
    trial.crash_with(1, 2)
    trial.hearer.wait(lambda: trial.hearer.restarting)
    trial.submit(3)
    trial.keeper.cancel(3)
    assert [(out.finished, out.from_engine) for out in trial.outs] == [([Finished(3, "cancelled")], False)]
    trial.may_start.set()
    trial.hearer.wait(lambda: len(trial.hearer.finished) == 3)
    assert all(out.from_engine for out in trial.outs[1:])


def test_while_suspects_are_tried_only_the_line_may_enter(lab: Callable[..., Lab]) -> None:
    trial = lab(set(), quiet=3)
    trial.crash_with(1, 2, 3)
    trial.hearer.wait(lambda: len(trial.hearer.finished) == 3)
    assert [out.short_of_blocks for out in trial.outs] == [True, True, False]


def test_a_wedged_engine_whose_end_nobody_tells_is_replaced(lab: Callable[..., Lab]) -> None:
    """As where a child of the engine process still holds its end of the socket."""
    seconds = itertools.count()
    settings = KeeperSettings(restarts=3, pause_s=0.0, silence_s=3.0)
    trial = lab(set(), quiet=1, settings=settings, clock=lambda: float(next(seconds)))
    trial.submit(1)
    trial.hearer.wait(lambda: trial.hearer.finished.get(1) == "length")
    assert trial.hearer.restarting == ["It did not answer for 3 s."]


def test_the_time_that_an_engine_takes_to_end_is_none_that_it_has_lived(lab: Callable[..., Lab]) -> None:
    now = [0.0]
    trial = lab(set(), clock=lambda: now[0])

    def slowly() -> None:
        now[0] += 2 * STEADY_S

    trial.on_close = slowly
    for at in range(1, 100):
        if trial.hearer.down:
            break
        trial.engines[-1].listener.on_down("It fell over.")
        trial.hearer.wait(lambda at=at: trial.hearer.restarted == at or trial.hearer.down)
    assert len(trial.engines) == 1 + 3


def test_an_engine_that_has_ended_says_nothing_more(lab: Callable[..., Lab]) -> None:
    """Its last words, if they are read late, are of no engine that is there."""
    trial = lab(set(), quiet=1)
    trial.may_start.clear()
    trial.crash_with(1)
    trial.hearer.wait(lambda: trial.hearer.restarting)
    old = trial.engines[0].listener
    old.on_step(StepOutput([], [TokenDelta(1, [7], [0])], [], 0, 1))
    old.on_stats(EngineStats(*[0] * 21, [], {}, {}))  # type: ignore[arg-type]
    assert trial.outs == [] and trial.hearer.stats == []


def test_ends_are_told_before_an_engine_that_is_slow_to_go_has_gone(lab: Callable[..., Lab]) -> None:
    trial = lab(set(), quiet=1)
    told: list[bool] = []
    trial.on_close = lambda: told.append(bool(trial.hearer.restarting))
    trial.crash_with(1)
    trial.hearer.wait(lambda: trial.hearer.finished)
    assert told[0], "who would come meanwhile is to stay in the outer queue"
