"""Several serving processes of one model with one engine: both ends of their connections, in one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morph_backend.admission import Admission, Admitted
from morph_backend.branch import BranchControl, CountsToOwner, OwnerLink
from morph_backend.branch_wire import KEY_BITS, Bye
from morph_backend.branches import Branches
from morph_backend.control import ControlFolder
from morph_backend.lifecycle import DrainDuty
from morph_backend.place import MOST, Place
from morph_backend.recorder import MetricsRecorder
from morph_runtime.credits import CreditLimits, EngineNews
from morph_runtime.engine.messages import (
    EngineInfo,
    EngineStats,
    Finished,
    SamplingParams,
    SetMode,
    StepOutput,
    Submit,
    TokenDelta,
)
from morph_runtime.errors import ConfigError, EngineDown

INFO = EngineInfo("m", "A", "cpu", "float32", 4, 100, [0], 512, 8, 16, "float32", 64, 4, ["w4"], 1, 0.0)


def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def key(index: int, number: int = 1) -> int:
    return (index << KEY_BITS) + number


@dataclass
class Heard:
    """A service, as far as the keeper speaks to it."""

    steps: list[StepOutput] = field(default_factory=list)
    words: list[tuple[str, str]] = field(default_factory=list)

    def on_step(self, out: StepOutput) -> None:
        self.steps.append(out)

    def on_stats(self, stats: EngineStats) -> None:
        self.words.append(("stats", ""))

    def on_restarting(self, reason: str) -> None:
        self.words.append(("restarting", reason))

    def on_restarted(self) -> None:
        self.words.append(("restarted", ""))

    def on_down(self, reason: str) -> None:
        self.words.append(("down", reason))


class Keeper:
    """What the owner's engine is told."""

    def __init__(self) -> None:
        self.submitted: list[Submit] = []
        self.cancelled: list[int] = []
        self.modes: list[SetMode] = []
        self.gone = ""

    def start(self, timeout_s: float = 120.0) -> EngineInfo:
        return INFO

    def submit(self, request: Submit) -> None:
        if self.gone:
            raise EngineDown(self.gone)
        self.submitted.append(request)

    def cancel(self, key: int) -> None:
        self.cancelled.append(key)

    def publish_queue(self, signal: Any) -> None:
        raise AssertionError("the owner's watch alone tells of the queue")

    def set_mode(self, mode: str = "", cap: float | None = None) -> None:
        self.modes.append(SetMode(mode, cap))

    def close(self, drain_s: float = 0.0) -> None:
        return


class Family:
    """An owner and `count - 1` branches."""

    def __init__(self, count: int = 2, line: int = 2) -> None:
        # The instances are children of one server: here both ends are this process, whose parent stands for it.
        name = f"model-{os.urandom(6).hex()}"
        self.places = [Place(index, count, os.getppid(), (name, "1")) for index in range(count)]
        self.heard = [Heard() for _ in range(count)]
        self.admission = Admission(CreditLimits(line))
        self.recorder = MetricsRecorder()
        self.defects: list[str] = []
        self.keeper = Keeper()
        self.branches = Branches(self.places[0], self.heard[0], self.admission, self.recorder, self.defects.append)
        self.branches.open()
        self.links = [OwnerLink(place) for place in self.places[1:]]

    def start(self) -> Family:
        self.branches.serve(self.keeper, INFO)
        for link, heard in zip(self.links, self.heard[1:], strict=True):
            assert link.start(60) == INFO
            link.listen(heard)
        return self

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.branches.close()
        assert self.defects == []


@pytest.fixture
def make_family() -> Iterator[Callable[..., Family]]:
    made: list[Family] = []

    def make(*arguments: int, **named: int) -> Family:
        made.append(Family(*arguments, **named))
        return made[-1]

    yield make
    for family in made:
        family.close()


@pytest.fixture
def family(make_family: Callable[..., Family]) -> Family:
    return make_family().start()


def never() -> bool:
    return False


def ask_in_thread(link: OwnerLink, keys: Sequence[int], give_up: Callable[[], bool] = never) -> list[Admitted]:
    found: list[Admitted] = []
    threading.Thread(
        target=lambda: found.append(link.admission.acquire(keys, 5, give_up, poll_s=0.002)), daemon=True
    ).start()
    return found


# -- whose is what ---------------------------------------------------------------------------------------------------


@st.composite
def steps(draw: st.DrawFn) -> StepOutput:
    keys = st.builds(key, st.integers(0, 3), st.integers(1, 50))
    started = draw(st.lists(keys, unique=True, max_size=6))
    told = draw(st.integers(0, len(started)))
    return StepOutput(
        started,
        [TokenDelta(k, [at], [0]) for at, k in enumerate(draw(st.lists(keys, max_size=12)))],
        [Finished(k, "stop") for k in draw(st.lists(keys, unique=True, max_size=6))],
        waiting=draw(st.integers(0, 9)),
        running=draw(st.integers(0, 9)),
        started_cached=[draw(st.integers(0, 99)) for _ in range(told)],
        short_of_blocks=draw(st.booleans()),
        from_engine=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(steps())
def test_each_process_hears_of_its_own_outputs_in_order_and_the_owner_of_all_starts_and_ends(out: StepOutput) -> None:
    place, own, told = Place(0, 4, 0, ("m", "1")), Heard(), {1: [], 2: [], 3: []}  # type: ignore[var-annotated]
    branches = Branches(place, own, Admission(CreditLimits(1)), MetricsRecorder(), lambda _: None)
    for index, news in told.items():
        branches.welcome(SimpleNamespace(index=index, step=news.append, tell=lambda _: None, close=lambda: None))  # type: ignore[arg-type]

    before = msgspec.msgpack.encode(out)
    branches.on_step(out)
    branches.close()

    (mine,) = own.steps
    assert (mine.started, mine.finished, mine.started_cached) == (out.started, out.finished, out.started_cached)
    assert mine.tokens == [delta for delta in out.tokens if delta.key >> KEY_BITS == 0]
    cached = dict(zip(out.started, out.started_cached, strict=False))
    for index, heard in told.items():
        assert len(heard) <= 1
        started = [k for k in out.started if k >> KEY_BITS == index]
        tokens = [delta for delta in out.tokens if delta.key >> KEY_BITS == index]
        finished = [end for end in out.finished if end.key >> KEY_BITS == index]
        if not (started or tokens or finished):
            assert not heard
            continue
        (news,) = heard
        assert (news.started, news.tokens, news.finished) == (started, tokens, finished)
        assert news.started_cached == [cached.get(k, 0) for k in started]
        assert (news.waiting, news.running, news.short_of_blocks, news.from_engine) == (
            out.waiting, out.running, out.short_of_blocks, out.from_engine
        )  # fmt: skip
    assert msgspec.msgpack.encode(out) == before, "the step itself is left as it was"


def test_what_a_branch_asks_of_the_engine_reaches_it_and_the_answers_come_back(family: Family) -> None:
    (link,) = family.links
    request = Submit(key(1), [1, 2], SamplingParams())
    link.submit(request)
    link.set_mode("off", 0.5)
    link.cancel(key(1))
    until(lambda: family.keeper.cancelled == [key(1)])
    assert family.keeper.submitted == [request] and family.keeper.modes == [SetMode("off", 0.5)]
    family.branches.on_restarting("killed")
    family.branches.on_restarted()
    family.branches.on_step(StepOutput([], [TokenDelta(key(1), [7], [0])], [Finished(key(1), "stop")], 0, 0))
    until(lambda: family.heard[1].steps)
    assert family.heard[1].words == family.heard[0].words == [("restarting", "killed"), ("restarted", "")]
    assert family.heard[1].steps[0].tokens[0].tokens == [7]


def test_a_request_that_no_engine_takes_any_more_ends(family: Family) -> None:
    family.keeper.gone = "five starts have come to nothing"
    family.links[0].submit(Submit(key(1), [1], SamplingParams()))
    until(lambda: family.heard[1].steps)
    (end,) = family.heard[1].steps[0].finished
    assert (end.key, end.reason, end.detail) == (key(1), "down", family.keeper.gone)


def test_counts_and_observations_of_a_branch_are_the_owners(family: Family) -> None:
    recorder = MetricsRecorder()
    sender = CountsToOwner(recorder, family.links[0], 60.0)
    recorder.count("a", 2, kind="x")
    recorder.observe("b", 0.5, 0.25)
    recorder.declare("c")
    sender.start()
    sender.close()
    until(lambda: family.recorder._changes.observations)
    changes = family.recorder.take()
    assert changes.counts == {("a", (("kind", "x"),)): 2.0} and changes.observations == {"b": [0.5, 0.25]}


# -- credits -----------------------------------------------------------------------------------------------------------


def test_all_processes_share_the_credits(family: Family) -> None:
    assert family.admission.acquire([1, 2], 5, never) is Admitted.YES
    found = ask_in_thread(family.links[0], [key(1)])
    until(lambda: family.admission.waiting == 1)
    assert not found and family.links[0].admission.waiting == 1
    family.admission.stepped([1], EngineNews())
    until(lambda: found)
    assert found == [Admitted.YES] and family.admission._holders.keys() == {2, key(1)}
    family.links[0].admission.release([key(1)])
    until(lambda: family.admission._holders.keys() == {2})


def test_who_gives_up_waiting_holds_no_credit(family: Family) -> None:
    family.admission.acquire([1, 2], 5, never)
    left = threading.Event()
    found = ask_in_thread(family.links[0], [key(1)], left.is_set)
    until(lambda: family.admission.waiting == 1)
    left.set()
    until(lambda: found)
    family.admission.stepped([1, 2], EngineNews())
    assert found == [Admitted.GAVE_UP] and not family.admission._holders
    again = ask_in_thread(family.links[0], [key(1, 2)])  # what was given up is forgotten
    until(lambda: again)
    assert again == [Admitted.YES]


def test_a_credit_that_comes_after_a_branch_takes_no_more_requests_is_given_back(family: Family) -> None:
    family.admission.acquire([1, 2], 5, never)
    found = ask_in_thread(family.links[0], [key(1)])
    until(lambda: family.admission.waiting == 1)
    family.links[0].admission.close()
    until(lambda: found)
    assert found == [Admitted.CLOSED]
    assert family.links[0].admission.acquire([key(1, 2)], 5, never) is Admitted.CLOSED
    family.admission.stepped([1, 2], EngineNews())
    until(lambda: not family.admission._holders and not family.admission.waiting)


def test_an_owner_that_takes_no_more_requests_says_so_to_who_waits(family: Family) -> None:
    family.admission.acquire([1, 2], 5, never)
    found = ask_in_thread(family.links[0], [key(1)])
    until(lambda: family.admission.waiting == 1)
    family.admission.close()
    until(lambda: found)
    assert found == [Admitted.CLOSED]


# -- beginnings and ends -----------------------------------------------------------------------------------------------


def test_branches_wait_for_the_engine_and_may_come_before_the_owner(make_family: Callable[..., Family]) -> None:
    family = make_family(3)
    infos: list[EngineInfo] = []
    threads = [threading.Thread(target=lambda link=link: infos.append(link.start(60))) for link in family.links]
    for thread in threads:
        thread.start()
    until(lambda: len(family.branches._connected) == 2)
    assert not infos
    family.branches.serve(family.keeper, INFO)
    for thread in threads:
        thread.join(60)
    assert infos == [INFO, INFO]


@pytest.mark.parametrize("error", [ConfigError("model_path: there is no such folder."), EngineDown("It has ended.")])
def test_branches_fail_with_the_sentence_of_the_owners_start(
    make_family: Callable[..., Family], error: Exception
) -> None:
    family = make_family()
    failures: list[Exception] = []

    def start() -> None:
        try:
            family.links[0].start(60)
        except (ConfigError, EngineDown) as found:
            failures.append(found)

    thread = threading.Thread(target=start)
    thread.start()
    family.branches.refuse(str(error), user_error=isinstance(error, ConfigError))
    thread.join(60)
    assert [(type(found), str(found)) for found in failures] == [(type(error), str(error))]


def test_an_owner_that_never_comes_is_not_waited_for_for_ever() -> None:
    link = OwnerLink(Place(1, 2, os.getppid(), ("nobody", os.urandom(6).hex())))
    with pytest.raises(EngineDown, match="first instance of the model was not there"):
        link.start(0.05)
    link.close()


def test_two_owners_of_one_model_in_one_server_are_refused(family: Family) -> None:
    second = Branches(family.places[0], Heard(), family.admission, family.recorder, family.defects.append)
    with pytest.raises(ConfigError, match="loaded already"):
        second.open()
    second.close()


def test_a_branch_that_vanishes_gives_back_what_it_held_and_ends_the_service(family: Family) -> None:
    (link,) = family.links
    assert link.admission.acquire([key(1)], 5, never) is Admitted.YES
    link.submit(Submit(key(1), [1], SamplingParams()))
    until(lambda: family.keeper.submitted)
    link._socket.shutdown(socket.SHUT_RDWR)  # as when its process is killed
    until(lambda: family.heard[0].words)
    assert family.heard[0].words == [("down", f"A serving process of the model ({os.getpid()}) has ended.")]
    assert family.keeper.cancelled == [key(1)] and not family.admission._holders


def test_requests_that_are_over_are_not_cancelled_when_their_process_ends(family: Family) -> None:
    (link,) = family.links
    link.admission.acquire([key(1)], 5, never)
    family.branches.on_step(StepOutput([key(1)], [], [Finished(key(1), "stop")], 0, 0))
    until(lambda: family.heard[1].steps)
    link.tell(Bye())
    link._socket.shutdown(socket.SHUT_RDWR)
    until(lambda: not family.branches._connected)
    family.branches.close()
    assert not family.keeper.cancelled and not family.heard[0].words


def test_a_model_that_is_loaded_beside_itself_takes_no_branch_away(family: Family) -> None:
    another = OwnerLink(family.places[1])
    with pytest.raises(ConfigError, match="loaded already"):
        another.start(60)
    another.close()
    family.links[0].set_mode("off")
    until(lambda: family.keeper.modes)
    family.branches.on_step(StepOutput([], [TokenDelta(key(1), [7], [0])], [], 0, 0))
    until(lambda: family.heard[1].steps)
    assert not family.heard[0].words


def test_credits_that_are_given_back_are_not_kept_in_mind(family: Family) -> None:
    (link,) = family.links
    for number in range(1, 20):
        assert link.admission.acquire([key(1, number)], 5, never) is Admitted.YES
        link.admission.release([key(1, number)])  # as for a request that turned out to be invalid
    (branch,) = family.branches._connected.values()
    until(lambda: not branch._keys and not family.admission._holders)


def test_an_unload_in_any_order_is_no_failure(family: Family) -> None:
    family.branches.close()
    link = family.links[0]
    until(lambda: link.admission._closed)
    assert link._thread is not None
    link._thread.join(60)
    assert not family.heard[1].words and link.admission.acquire([key(1)], 5, never) is Admitted.CLOSED


def test_streams_of_a_branch_end_when_the_owner_has_vanished(family: Family) -> None:
    family.branches._connected[1]._hang_up()
    until(lambda: family.heard[1].words)
    assert family.heard[1].words == [("down", "The serving process that owns the engine has ended.")]
    assert family.links[0].admission.acquire([key(1)], 5, never) is Admitted.CLOSED


def test_the_end_is_told_to_all_once_whoever_sees_it(make_family: Callable[..., Family]) -> None:
    family = make_family(3).start()
    family.links[0].gone("Triton hangs")
    until(lambda: family.heard[2].words)
    until(lambda: family.heard[0].words)
    family.branches.on_down("the engine is given up, too")
    family.links[1].gone("so it does")
    family.links[1].set_mode("off")
    until(lambda: family.keeper.modes)  # what was sent before has been heard
    until(lambda: family.heard[1].words)
    assert [heard.words for heard in family.heard] == [[("down", "Triton hangs")]] * 3


def test_a_process_that_is_no_instance_of_this_server_is_turned_away(family: Family) -> None:
    place = family.places[0]
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(60);"
        "s.connect('\\0' + sys.argv[1]); sys.exit(0 if s.recv(1) == b'' else 1)"
    )
    stranger = subprocess.run([sys.executable, "-c", code, place.address[1:]], timeout=60)  # a child of ours
    assert stranger.returncode == 0 and len(family.branches._connected) == 1


def test_a_stranger_in_the_owners_place_is_told_nothing() -> None:
    place = Place(1, 2, os.getppid(), ("taken", os.urandom(6).hex()))
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind('\\0' + sys.argv[1]); s.listen();"
        "print('up', flush=True); c, _ = s.accept(); sys.exit(0 if c.recv(1) == b'' else 1)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, place.address[1:]], stdout=subprocess.PIPE, text=True
    ) as stranger:
        assert stranger.stdout is not None and stranger.stdout.readline() == "up\n"
        link = OwnerLink(place)
        with pytest.raises(EngineDown, match="no instance of this server"):
            link.start(60)
        link.close()
        assert stranger.wait(60) == 0


def test_the_owner_is_drained_when_all_processes_are(family: Family, tmp_path: Any) -> None:
    control = ControlFolder(tmp_path)
    control.ask_drain(30.0)
    idle: Any = SimpleNamespace(num_open=0, refuse=lambda _: None, abort=lambda _: None)
    owner = DrainDuty(idle, control, undrained=lambda: family.branches.undrained)
    owner()
    assert control.heard("drained") is None
    DrainDuty(idle, BranchControl(control, family.links[0]))()
    until(lambda: family.branches.undrained == 0)
    owner()
    assert control.heard("drained") is not None


# -- which one ---------------------------------------------------------------------------------------------------------


def instance(name: str, *groups: dict[str, Any]) -> Place:
    return Place.of(
        {"model_name": "morph", "model_version": "1", "model_instance_name": name}, {"instance_group": list(groups)}, 1
    )


def test_an_instance_knows_its_number() -> None:
    assert (instance("morph_0_2", {"count": 3}).index, instance("morph_0_2", {"count": 3}).count) == (2, 3)
    assert (instance("anything", {"count": 1}).index, instance("morph_0_0").count) == (0, 1)
    assert instance("morph_0_0", {"count": 2}).address == instance("morph_0_1", {"count": 2}).address


@pytest.mark.parametrize(
    ("name", "groups", "words"),
    [
        ("morph_0_1", [{"count": 1}, {"count": 1}], "one group"),
        ("morph_0_gpu0", [{"count": 1, "gpus": [0, 1]}], "one group"),
        ("morph_0_1", [{"count": MOST + 1}], f"at most {MOST}"),
    ],
)
def test_instances_that_cannot_share_an_engine_are_refused(name: str, groups: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        instance(name, *groups)
