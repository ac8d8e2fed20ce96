"""The side of a serving process that has no engine of its own: the one that has looks like an engine to it."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import msgspec

from morph_backend.admission import Admitted
from morph_backend.branch_wire import (
    Answer,
    Ask,
    Bye,
    Counted,
    Down,
    Drained,
    GiveUp,
    Gone,
    Hello,
    Refused,
    Release,
    Restarted,
    Restarting,
    ToBranch,
    Welcome,
)
from morph_backend.control import ControlFolder
from morph_backend.place import Place
from morph_backend.recorder import MetricsRecorder
from morph_backend.worker import Worker
from morph_runtime.credits import CreditLimits, EngineNews
from morph_runtime.engine.handle import KeeperListener
from morph_runtime.engine.messages import Cancel, EngineInfo, QueueSignal, SetMode, StepOutput, Submit
from morph_runtime.engine.wire import FrameReader, FrameWriter
from morph_runtime.errors import ConfigError, EngineDown

AGAIN_S = 0.05
"""Between looks whether the owner is there yet: both start at the same time."""


class OwnerLink:
    """A `ServingEngine`: the engine, as the owner of it passes on what it is told and says. Safe to use from several
    threads."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._writer = FrameWriter(self._socket)
        self._reader: FrameReader[ToBranch] = FrameReader(self._socket, msgspec.msgpack.Decoder(ToBranch))
        self._closing = threading.Event()
        self._met = False
        self._thread: threading.Thread | None = None
        self.admission = OwnerAdmission(self.tell)

    def start(self, timeout_s: float = 120.0) -> EngineInfo:
        """Find the owner and wait until its engine is ready.

        Raises:
            ConfigError, EngineDown: as the owner's start; or it could not be found within `timeout_s` seconds, or
                somebody else has taken its place.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                self._socket.connect(self._place.address)
                break
            except OSError:
                if time.monotonic() >= deadline_s:
                    raise EngineDown(f"The first instance of the model was not there within {timeout_s:g} s.") from None
            self._closing.wait(AGAIN_S)
        if not self._place.fellow(self._socket):
            raise EngineDown("What answers in the first instance's place is no instance of this server.")
        self._met = True
        self.tell(Hello(self._place.index))
        self._socket.settimeout(max(deadline_s - time.monotonic(), AGAIN_S))
        try:
            first = self._reader.receive()
        except TimeoutError:
            raise EngineDown(f"The engine was not ready within {timeout_s:g} s.") from None
        self._socket.settimeout(None)
        if isinstance(first, Welcome):
            return first.info
        if isinstance(first, Refused):
            raise (ConfigError if first.user_error else EngineDown)(first.message)
        raise EngineDown("The first instance of the model has ended while starting.")

    def listen(self, listener: KeeperListener) -> None:
        """From now on, tell the listener what comes."""
        self._thread = threading.Thread(target=self._read, args=(listener,), name="engine-reader", daemon=True)
        self._thread.start()

    def submit(self, request: Submit) -> None:
        """Hand a request in. Raises EngineDown."""
        self.tell(request)

    def cancel(self, key: int) -> None:
        """End a request. Raises EngineDown."""
        self.tell(Cancel(key=key))

    def set_mode(self, mode: str = "", cap: float | None = None) -> None:
        """Change the controller's mode, its cap, or both. Raises EngineDown."""
        self.tell(SetMode(mode, cap))

    def publish_queue(self, signal: QueueSignal) -> None:
        """Nothing: the owner looks at the queue by itself."""

    def gone(self, reason: str) -> None:
        """Nothing can be served any more."""
        with contextlib.suppress(EngineDown):
            self.tell(Gone(reason))

    def close(self, drain_s: float = 0.0) -> None:
        """Say good-bye; no word follows."""
        self._closing.set()
        if self._met:
            with contextlib.suppress(EngineDown):
                self.tell(Bye())
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)
        self._socket.close()

    def tell(self, message: msgspec.Struct) -> None:
        """Send one message. Raises EngineDown."""
        self._writer.send(message)

    def _read(self, listener: KeeperListener) -> None:
        reason = "The serving process that owns the engine has ended."
        try:
            while (message := self._reader.receive()) is not None:
                match message:
                    case StepOutput():
                        listener.on_step(message)
                    case Answer(admitted):
                        self.admission.answered(Admitted(admitted))
                    case Restarting(why):
                        listener.on_restarting(why)
                    case Restarted():
                        listener.on_restarted()
                    case Down(why):
                        listener.on_down(why)
                    case Bye():
                        self._closing.set()
        except Exception as error:  # whatever it was must reach `on_down`, or every stream would hang
            logging.getLogger(__name__).exception("the owner's messages could not be handled")
            reason = f"The engine's messages could not be handled ({error})."
        self.admission.close()
        if not self._closing.is_set():
            listener.on_down(reason)


@dataclass
class _Question:
    """For credits: for which outputs, what the owner has said, and whether nobody waits for it any more."""

    keys: list[int]
    answer: Admitted | None = None
    left: bool = False


class OwnerAdmission:
    """Credits that the owner gives out, so that the line in the engine is as long as with one process."""

    def __init__(self, tell: Callable[[msgspec.Struct], None]) -> None:
        self._tell = tell
        self._changed = threading.Condition()
        self._question: _Question | None = None  # the last one
        self._closed = False

    @property
    def waiting(self) -> int:
        """Requests that wait for a credit right now."""
        return int(self._question is not None and not self._question.left)

    def set_limits(self, limits: CreditLimits) -> None:
        """Nothing: they are the owner's."""

    def acquire(
        self, keys: Collection[int], prompt_tokens: int, give_up: Callable[[], bool], poll_s: float = 0.05
    ) -> Admitted:
        """As `Admission.acquire`; one call at a time, as `execute()` is called."""
        question, given_up = _Question(list(keys)), False
        with self._changed:
            if self._closed:
                return Admitted.CLOSED
            self._question = question
            try:
                self._tell(Ask(question.keys, prompt_tokens))
                while not self._over(question):
                    if not given_up and give_up():
                        given_up = True
                        self._tell(GiveUp())
                    self._changed.wait(poll_s)
            except EngineDown:  # the reader tells why
                return Admitted.CLOSED
            finally:
                question.left = True
        if question.answer is None:
            return Admitted.CLOSED
        if given_up and question.answer is Admitted.YES:
            self.release(keys)
            return Admitted.GAVE_UP
        return question.answer

    def _over(self, question: _Question) -> bool:
        return self._closed or question.answer is not None

    def answered(self, admitted: Admitted) -> None:
        """The owner's answer."""
        with self._changed:
            question = self._question
            if question is None:
                return
            late = question.left and question.answer is None
            question.answer = admitted
            self._changed.notify_all()
        if late and admitted is Admitted.YES:
            self.release(question.keys)

    def release(self, keys: Iterable[int]) -> None:
        """Give back the credits of `keys`; those that hold none are passed over."""
        if gone := list(keys):
            with contextlib.suppress(EngineDown):
                self._tell(Release(gone))

    def stepped(self, keys: Iterable[int], news: EngineNews) -> None:
        """Nothing: the owner has heard the same before."""

    def wake(self) -> None:
        """Make those who wait ask `give_up` now."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Ask for no more credits; who waits is told `CLOSED`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class BranchControl(ControlFolder):
    """The launcher's words are heard as by the owner; what a branch has to say goes to the owner."""

    def __init__(self, control: ControlFolder, link: OwnerLink) -> None:
        super().__init__(None)
        self._control, self._link = control, link

    def drain_asked(self) -> float | None:
        """See `ControlFolder`."""
        return self._control.drain_asked()

    def say(self, what: str, text: str = "") -> None:
        """Pass on that everything has ended, or why nothing can be served; the rest is the owner's to say."""
        if what == "drained":
            with contextlib.suppress(EngineDown):
                self._link.tell(Drained())
        elif what == "error":
            self._link.gone(text)


class CountsToOwner(Worker):
    """Sends the recorder's counts and observations to the owner, every `interval_s` seconds and when it is closed.

    Metrics of one family that two processes make crash Triton 2.51, so the owner alone exports.
    """

    def __init__(
        self,
        recorder: MetricsRecorder,
        link: OwnerLink,
        interval_s: float,
        on_defect: Callable[[str], None] = lambda _thread: None,
    ) -> None:
        super().__init__("metrics", interval_s, on_defect)
        self._recorder, self._link = recorder, link

    def _run(self) -> None:
        last = False
        while True:
            changes = self._recorder.take()
            counts = [(name, labels, value) for (name, labels), value in changes.counts.items() if value > 0]
            if counts or changes.observations:
                with contextlib.suppress(EngineDown):  # nobody is left to count
                    self._link.tell(Counted(counts, changes.observations))
            if last:
                return
            last = self._stop.wait(self._interval_s)
