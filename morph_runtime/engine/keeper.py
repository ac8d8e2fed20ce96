"""Keeps an engine running: what ends its process costs its requests time, not tokens.

Stands between the serving process and `EngineClient` and looks like the latter. It keeps every request with the
tokens that have come; when the engine process has ended, or does not answer any more, it starts another one and
hands the requests in again. Only when several starts in a row come to nothing is `on_down` called.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from morph_runtime.engine.client import EngineListener
from morph_runtime.engine.handle import EngineHandle, KeeperListener, KeeperSettings
from morph_runtime.engine.kept import KeptRequests
from morph_runtime.engine.messages import (
    Cancel,
    EngineInfo,
    EngineStats,
    Finished,
    QueueSignal,
    SetMode,
    StepOutput,
    Submit,
)
from morph_runtime.engine.patience import Patience
from morph_runtime.errors import ConfigError, EngineDown

TICK_S = 0.5
STEADY_S = 10.0
"""An engine that has lived this long, not silent at its end, or has produced a token, has started well: failures before
it do not count."""
QUIET_S = 2.0
"""After this long without a word of the engine it is told nothing that it can do without."""


class Run:
    """The life of one engine process; listens to it and passes on what it says while it is the present one."""

    def __init__(self, keeper: EngineKeeper, make: Callable[[EngineListener], EngineHandle]) -> None:
        self._keeper = keeper
        self.engine = make(self)
        self.ready_s = 0.0
        self.heard = False  # since the watchdog last looked
        self.produced = False
        self.wedged = False
        self.down = ""  # why it has ended

    def on_step(self, out: StepOutput) -> None:
        self.heard = True
        self.produced = self.produced or bool(out.tokens)
        self._keeper.stepped(self, out)

    def on_stats(self, stats: EngineStats) -> None:
        self.heard = True
        self._keeper.reported(self, stats)

    def on_down(self, reason: str) -> None:
        self.down = reason or "The engine process ended unexpectedly."
        self._keeper.wake()


class EngineKeeper:
    """Safe to use from several threads. Has two: one watches and restarts, one writes, so that no caller ever waits
    for an engine that does not read."""

    def __init__(
        self,
        make: Callable[[EngineListener], EngineHandle],
        listener: KeeperListener,
        settings: KeeperSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`make` makes the handle of a new engine process, with the listener it is to tell."""
        self._make, self._listener, self._settings, self._clock = make, listener, settings, clock
        self._lock = threading.Lock()  # guards what follows, down to _gone
        self._kept = KeptRequests(self._write)
        self._run: Run | None = None  # the engine that requests go to; None while there is none
        self._mode = SetMode()
        self._gone = ""  # why there will be no engine any more
        self._present: Run | None = None  # the engine that close() must end, ready or not
        self._telling = threading.RLock()  # one call of the listener at a time; it may cancel meanwhile
        self._outbox: SimpleQueue[tuple[Run, Submit | Cancel | QueueSignal | SetMode] | None] = SimpleQueue()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._silent_s = 0.0
        self._patience = Patience(settings.restarts, settings.pause_s)
        self._threads = [
            threading.Thread(target=self._watch, name="engine-keeper", daemon=True),
            threading.Thread(target=self._deliver, name="engine-writer", daemon=True),
        ]

    # -- what the serving process asks for -------------------------------------------------------------------------

    def start(self, timeout_s: float = 120.0) -> EngineInfo:
        """Start the first engine; if that fails, nothing is tried again.

        Raises:
            ConfigError, EngineDown: as `EngineClient.start`.
        """
        info = self._begin(Run(self, self._make), timeout_s)
        for thread in self._threads:
            thread.start()
        return info

    def submit(self, request: Submit) -> None:
        """Take a request; it waits if the engine is being restarted. Raises EngineDown if none will come."""
        with self._lock:
            if self._gone:
                raise EngineDown(self._gone)
            self._kept.add(request)
            if self._run is not None:
                self._kept.admit()

    def cancel(self, key: int) -> None:
        """End a request; `Finished(reason="cancelled")` follows unless it has ended already."""
        with self._lock:
            ended = self._kept.cancel(key)
            if self._run is not None:
                self._kept.admit()
        if ended is not None:
            self._tell([ended])

    def publish_queue(self, signal: QueueSignal) -> None:
        """Tell the controller what the outer queue shows, if it listens."""
        with self._lock:
            if self._silent_s < QUIET_S:
                self._write(signal)

    def set_mode(self, mode: str = "", cap: float | None = None) -> None:
        """Change the controller's mode, its cap, or both, also of engines to come."""
        with self._lock:
            before = self._mode
            self._mode = SetMode(mode or before.mode, before.cap if cap is None else cap)
            self._write(self._mode)

    def close(self, drain_s: float = 0.0) -> None:
        """End the engine and both threads; no word follows."""
        self._closing.set()
        with self._lock:
            self._gone = self._gone or "The engine is closed."
            present = self._present
        if present is not None:
            present.engine.close(drain_s)
        self._wake.set()
        self._outbox.put(None)
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(5.0)

    # -- what an engine says ---------------------------------------------------------------------------------------

    def stepped(self, run: Run, out: StepOutput) -> None:
        """A step of an engine. It counts only for the present one: of an older one the requests are elsewhere now."""
        with self._telling:  # first, so that what an engine has said is never told after its end
            with self._lock:
                if run is not self._run:
                    return
                out = self._kept.step(out)
            self._listener.on_step(out)

    def reported(self, run: Run, stats: EngineStats) -> None:
        """A snapshot of an engine."""
        with self._telling:
            if run is self._run:
                self._listener.on_stats(stats)

    def wake(self) -> None:
        """An engine has ended."""
        self._wake.set()

    # -- the thread that watches -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        looked_s = self._clock()
        while not self._closing.is_set():
            self._wake.wait(TICK_S)
            self._wake.clear()
            run, now = self._run, self._clock()
            if run is None or self._closing.is_set():
                break
            # Of a long pause only a part counts: it was this process that stood still.
            elapsed_s, looked_s = min(now - looked_s, 2 * TICK_S), now
            try:
                if run.down:
                    self._replace(run)
                else:
                    self._look_at(run, elapsed_s)
            except Exception as error:
                logging.getLogger(__name__).exception("the engine cannot be looked after")
                self._give_up(f"The engine cannot be looked after: {error}.")

    def _look_at(self, run: Run, elapsed_s: float) -> None:
        """Notice an engine that has stopped answering."""
        with self._lock:
            silent = not run.heard and self._kept.num_inside > 0
            run.heard = False
            self._silent_s = self._silent_s + elapsed_s if silent else 0.0
        if self._settings.silence_s and self._silent_s >= self._settings.silence_s:
            logging.getLogger(__name__).error("the engine has not answered for %.0f s and is ended", self._silent_s)
            run.wedged = True
            run.engine.kill()
            self._replace(run)  # its end may never be told: a child of its may hold the socket

    def _replace(self, run: Run) -> None:
        """Start another engine in place of one that has ended, and hand it the requests."""
        with self._lock:
            self._run = None
        if run.produced or (not run.wedged and self._clock() - run.ready_s > STEADY_S):
            self._patience.well_started()
        reason = f"It did not answer for {self._settings.silence_s:g} s." if run.wedged else run.down
        logging.getLogger(__name__).error("the engine has ended: %s", reason)
        with self._telling:
            self._listener.on_restarting(reason)
        run.engine.close()  # may take seconds
        outside = run.engine.ended_from_outside and not run.wedged
        with self._lock:
            convicted = not outside and self._kept.on_trial
            ended = self._kept.crashed(own_fault=not outside)
            self._silent_s = 0.0
        self._tell(ended)
        logger, patience = logging.getLogger(__name__), self._patience
        while (pause_s := patience.next_pause_s(outside, convicted)) is not None:
            in_vain = f" ({patience.in_vain} in a row have come to nothing)" if patience.in_vain else ""
            logger.error("the engine is restarted%s: %s", in_vain, reason)
            if self._closing.wait(pause_s):
                return
            run = Run(self, self._make)
            try:
                self._begin(run, self._settings.start_timeout_s)
            except (ConfigError, EngineDown) as error:
                if self._closing.is_set():
                    return
                reason, outside, convicted = str(error), run.engine.ended_from_outside, False
            else:
                with self._telling:
                    self._listener.on_restarted()
                return
        in_vain = f": {patience.in_vain} starts in a row have come to nothing" if patience.in_vain else ""
        logger.error("the engine is given up%s", in_vain)
        self._give_up(reason)

    def _begin(self, run: Run, timeout_s: float) -> EngineInfo:
        """Start an engine and make it the present one."""
        with self._lock:
            if self._closing.is_set():
                raise EngineDown("The engine is closed.")
            self._present = run
        try:
            info = run.engine.start(timeout_s)
        except (ConfigError, EngineDown):
            run.engine.close()
            raise
        run.ready_s = self._clock()
        with self._lock:
            self._run = run
            if self._mode != SetMode():
                self._write(self._mode)
            self._kept.admit()
        return info

    def _give_up(self, reason: str) -> None:
        with self._lock:
            self._gone = reason
            self._run = None
            self._kept.clear()
        with self._telling:
            self._listener.on_down(reason)

    def _tell(self, ended: list[Finished]) -> None:
        """Report ends that no engine has told."""
        if ended:
            with self._telling:
                self._listener.on_step(StepOutput([], [], ended, waiting=0, running=0, from_engine=False))

    # -- the thread that writes ------------------------------------------------------------------------------------

    def _write(self, message: Submit | Cancel | QueueSignal | SetMode) -> None:
        """Put a message for the present engine on its way; the lock is held, so the order is that of the decisions."""
        if self._run is not None:
            self._outbox.put((self._run, message))

    def _deliver(self) -> None:
        while (item := self._outbox.get()) is not None:
            run, message = item
            try:
                _send(run.engine, message)
            except EngineDown as error:
                logging.getLogger(__name__).debug("not delivered: %s", error)  # `on_down` follows, or has come
            except Exception as error:
                logging.getLogger(__name__).exception("a message for the engine cannot be sent")
                if isinstance(message, Submit):
                    self._lose(message.key, f"The request could not be sent to the engine: {error}.")

    def _lose(self, key: int, detail: str) -> None:
        with self._lock:
            ended = self._kept.fail(key, detail)
            if self._run is not None:
                self._kept.admit()
        self._tell(ended)


def _send(engine: EngineHandle, message: Submit | Cancel | QueueSignal | SetMode) -> None:
    if isinstance(message, Submit):
        engine.submit(message)
    elif isinstance(message, Cancel):
        engine.cancel(message.key)
    elif isinstance(message, QueueSignal):
        engine.publish_queue(message)
    else:
        engine.set_mode(message.mode, message.cap)
