"""The side of the serving process that owns the engine: the other ones of its model, its branches."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from itertools import zip_longest
from queue import SimpleQueue

import msgspec

from morph_backend.admission import Admission, Admitted
from morph_backend.branch_wire import (
    KEY_BITS,
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
    ToOwner,
    Welcome,
)
from morph_backend.place import Place
from morph_backend.recorder import MetricsRecorder
from morph_runtime.engine.handle import KeeperListener, ServingEngine
from morph_runtime.engine.messages import Cancel, EngineInfo, EngineStats, Finished, SetMode, StepOutput, Submit
from morph_runtime.engine.wire import FrameReader, FrameWriter
from morph_runtime.errors import ConfigError, EngineDown

REFUSED_WITHIN_S = 60.0
"""A start that fails waits so long for the branches that are still to be told."""
LOADED = "The model is loaded already, and cannot be loaded beside itself with several instances"
THREAD = "branch"
"""As defects of all threads here are counted."""


class Branches:
    """Stands between the keeper and the owner's own service: hands each of them, and each branch, what is theirs.

    Safe to use from several threads.
    """

    def __init__(
        self,
        place: Place,
        service: KeeperListener,
        admission: Admission,
        recorder: MetricsRecorder,
        on_defect: Callable[[str], None],
    ) -> None:
        """`service` is the owner's; `admission` and `recorder` are for all."""
        self.admission, self.recorder, self.on_defect = admission, recorder, on_defect
        self._place, self._service = place, service
        self._lock = threading.Condition()  # guards what follows
        self._connected: dict[int, Branch] = {}
        self._engine: ServingEngine | None = None
        self._info: EngineInfo | None = None
        self._down = ""
        self._closing = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._accept, name=THREAD, daemon=True)

    # -- life ------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Let the branches come.

        Raises:
            ConfigError: a model of this name and version is loaded in this server, or somebody has taken its place.
        """
        try:
            self._socket.bind(self._place.address)
        except OSError as error:
            raise ConfigError(f"{LOADED}, or another program has taken its instances' place ({error}).") from None
        self._socket.listen(self._place.count)
        self._thread.start()

    def serve(self, engine: ServingEngine, info: EngineInfo) -> None:
        """The engine is there."""
        with self._lock:
            self._engine, self._info = engine, info
            for branch in self._connected.values():
                branch.tell(Welcome(info))

    def refuse(self, message: str, *, user_error: bool) -> None:
        """There will be no engine: the branches must not wait for it."""
        with self._lock:
            self._lock.wait_for(lambda: len(self._connected) >= self._place.count - 1, REFUSED_WITHIN_S)
            for branch in self._connected.values():
                branch.tell(Refused(message, user_error))
        self.close()

    def close(self) -> None:
        """Say good-bye, and end the connections."""
        with self._lock:
            self._closing = True
            branches = list(self._connected.values())
        with contextlib.suppress(OSError):  # nobody could have come
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for branch in branches:
            branch.tell(Bye())
            branch.close()

    def kill(self) -> None:
        """End the processes that are still connected, at once: the server has died."""
        for branch in list(self._connected.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(branch.pid, signal.SIGKILL)

    @property
    def undrained(self) -> int:
        """Branches that may have open requests."""
        with self._lock:
            return sum(not branch.drained for branch in self._connected.values())

    # -- what the keeper tells ---------------------------------------------------------------------------------------

    def on_step(self, out: StepOutput) -> None:
        """Each gets the tokens and ends of its own requests; the owner, who keeps the credits, all starts and ends."""
        parts: dict[int, StepOutput] = {}

        def part(key: int) -> StepOutput:
            index = key >> KEY_BITS
            if index not in parts:
                empty: dict[str, list[object]] = {"started": [], "tokens": [], "finished": [], "started_cached": []}
                parts[index] = msgspec.structs.replace(out, **empty)
            return parts[index]

        for key, cached in zip_longest(out.started, out.started_cached, fillvalue=0):
            part(key).started.append(key)
            part(key).started_cached.append(cached)
        for delta in out.tokens:
            part(delta.key).tokens.append(delta)
        for finished in out.finished:
            part(finished.key).finished.append(finished)
        own = parts.pop(0, None)
        for index, news in parts.items():
            if (branch := self._connected.get(index)) is not None:
                branch.step(news)
        self._service.on_step(msgspec.structs.replace(out, tokens=own.tokens if own else []))

    def on_stats(self, stats: EngineStats) -> None:
        """For the owner alone."""
        self._service.on_stats(stats)

    def on_restarting(self, reason: str) -> None:
        """For all."""
        self._tell_all(Restarting(reason))
        self._service.on_restarting(reason)

    def on_restarted(self) -> None:
        """For all."""
        self._service.on_restarted()
        self._tell_all(Restarted())

    def on_down(self, reason: str) -> None:
        """For all, once: the keeper says it, or a process in which Triton hangs."""
        with self._lock:
            if self._down or self._closing:
                return
            self._down = reason
        self._tell_all(Down(reason))
        self._service.on_down(reason)

    # -- what branches tell ----------------------------------------------------------------------------------------

    @property
    def engine(self) -> ServingEngine:
        """The keeper. Raises EngineDown before there is one."""
        if self._engine is None:
            raise EngineDown("The engine is not there yet.")
        return self._engine

    def welcome(self, branch: Branch) -> None:
        """A branch has said its name."""
        with self._lock:
            if branch.index in self._connected:  # of a model that is loaded anew while this one serves
                branch.tell(Refused(f"{LOADED}.", user_error=True))
                return
            self._connected[branch.index] = branch
            if self._info is not None:
                branch.tell(Welcome(self._info))
            if self._down:
                branch.tell(Down(self._down))
            self._lock.notify_all()

    def ended(self, branch: Branch, *, in_order: bool) -> None:
        """A connection has ended. If that was without a word, the process has, and Triton does not end its streams."""
        with self._lock:
            if self._connected.get(branch.index) is not branch:
                return
            del self._connected[branch.index]
        # With the server's own end each process ends by itself, in any order.
        if not in_order and not self._closing and os.getppid() == self._place.server:
            self.on_down(f"A serving process of the model ({branch.pid}) has ended.")

    def _tell_all(self, message: msgspec.Struct) -> None:
        with self._lock:
            for branch in self._connected.values():
                branch.tell(message)

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                if not self._closing:
                    logging.getLogger(__name__).exception("no more instances can come")
                    self.on_defect(THREAD)
                return
            if pid := self._place.fellow(connection):
                Branch(self, connection, pid).start()
            else:
                logging.getLogger(__name__).warning("a process that is no instance of this server was turned away")
                connection.close()


class Branch:
    """The owner's end of one connection; one thread reads, one writes, one waits for credits."""

    def __init__(self, owner: Branches, connection: socket.socket, pid: int) -> None:
        self.pid, self.index = pid, 0
        self.over = False
        self.drained = False
        self._owner, self._socket = owner, connection
        self._keys: set[int] = set()
        self._given_up = self._left = False
        self._outbox: SimpleQueue[msgspec.Struct | None] = SimpleQueue()
        self._asked: SimpleQueue[Ask | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=THREAD, daemon=True)
            for work in (self._write, self._admit, self._read)  # the last lets others know of it
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def tell(self, message: msgspec.Struct) -> None:
        """Send a message, after those before it; never waits."""
        self._outbox.put(message)

    def step(self, news: StepOutput) -> None:
        """Its part of what a step has brought."""
        self._keys.difference_update(finished.key for finished in news.finished)
        self.tell(news)

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is queued, and end the connection."""
        self._outbox.put(None)
        self._threads[0].join(timeout_s)
        self._hang_up()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:  # what it leaves undone would hang streams: the process is given up
            logging.getLogger(__name__).exception("an instance cannot be served")
            self._owner.on_defect(THREAD)
            self._hang_up()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):  # it may have ended
            self._socket.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        writer = FrameWriter(self._socket)
        while (message := self._outbox.get()) is not None:
            try:
                writer.send(message)
            except EngineDown:
                return  # the reader hears of it

    def _admit(self) -> None:
        admission = self._owner.admission
        while (ask := self._asked.get()) is not None:
            admitted = admission.acquire(ask.keys, ask.prompt_tokens, lambda: self._given_up or self.over)
            if admitted is not Admitted.YES:
                self._keys.difference_update(ask.keys)
            elif self.over:
                admission.release(ask.keys)
            self.tell(Answer(admitted.value))

    def _read(self) -> None:
        reader: FrameReader[ToOwner] = FrameReader(self._socket, msgspec.msgpack.Decoder(ToOwner))
        try:
            while (message := reader.receive()) is not None:
                self._hear(message)
        except EngineDown as error:
            logging.getLogger(__name__).error("%s", error)
        finally:
            self._end()

    def _hear(self, message: ToOwner) -> None:
        owner = self._owner
        match message:
            case Submit():
                self._submit(message)
            case Cancel(key):
                owner.engine.cancel(key)
            case Ask(keys):
                self._given_up = False
                self._keys.update(keys)
                self._asked.put(message)
            case GiveUp():
                self._given_up = True
                owner.admission.wake()
            case Release(keys):
                self._keys.difference_update(keys)
                owner.admission.release(keys)
            case Counted(counts, observations):
                owner.recorder.count_all(((name, labels), value) for name, labels, value in counts)
                for name, values in observations.items():
                    owner.recorder.observe(name, *values)
            case SetMode(mode, cap):
                owner.engine.set_mode(mode, cap)
            case Drained():
                self.drained = True
            case Gone(reason):
                owner.on_down(reason)
            case Hello(index):
                self.index = index
                owner.welcome(self)
            case Bye():
                self._left = True

    def _submit(self, message: Submit) -> None:
        try:
            self._owner.engine.submit(message)
        except EngineDown as error:
            ended = [Finished(message.key, "down", str(error))]
            self._owner.admission.release([message.key])
            self.step(StepOutput([], [], ended, waiting=0, running=0, from_engine=False))

    def _end(self) -> None:
        """Nobody is left to hear: its requests are given up."""
        self.over = True
        self._hang_up()
        self._asked.put(None)
        self._outbox.put(None)
        self._owner.admission.wake()
        for key in list(self._keys):
            with contextlib.suppress(EngineDown):
                self._owner.engine.cancel(key)
        self._owner.admission.release(list(self._keys))
        self._threads[0].join()  # what it has to say finds nobody
        self._socket.close()
        self._owner.ended(self, in_order=self._left)
