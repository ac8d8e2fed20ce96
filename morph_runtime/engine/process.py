"""The engine process: reads messages, steps while there is work, sends what came of it.

Run by `EngineClient` as `python -m morph_runtime.engine.process --fd N`; it ends when that socket closes.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from morph_runtime.config import EngineConfig, log_level
from morph_runtime.engine.messages import (
    Cancel,
    Drain,
    EngineFailure,
    QueueSignal,
    SetMode,
    Start,
    Submit,
    ToEngine,
)
from morph_runtime.engine.orphan import OrphanGuard
from morph_runtime.engine.wire import FrameReader, FrameWriter
from morph_runtime.errors import ConfigError, EngineDown

EXIT_AFTER_S = 5.0
SHIFT_POLL_S = 0.002
"""Between looks at a GPU that copies layers while no step runs; one takes 8 ms."""
QUIET_S, CHECK_EVERY_S = 1.0, 60.0
"""The books are checked when there has been nothing to do for so long, and no more often than that: a check stops the
loop (60 ms where 40,000 blocks are cached), and a client that waits for its answers sends the next request at once."""


class Inbox:
    """Messages from the serving process, taken off the socket by a thread of their own."""

    def __init__(self, reader: FrameReader[ToEngine]) -> None:
        self._reader = reader
        self._messages: collections.deque[ToEngine] = collections.deque()
        self._wake = threading.Event()
        self.closed = threading.Event()
        self.finished = threading.Event()
        threading.Thread(target=self._pump, name="inbox", daemon=True).start()

    def wake(self) -> None:
        """End a `wait` (something other than a message has happened)."""
        self._wake.set()

    def wait(self, timeout_s: float) -> bool:
        """Return at the next message or `wake`, at the latest after `timeout_s` seconds; False if there was neither."""
        return self._wake.wait(timeout_s)

    def take(self) -> list[ToEngine]:
        """All messages that have come."""
        self._wake.clear()
        taken = []
        while self._messages:
            taken.append(self._messages.popleft())
        return taken

    def _pump(self) -> None:
        try:
            while (message := self._reader.receive()) is not None:
                self._messages.append(message)
                self._wake.set()
        except EngineDown as error:
            logging.getLogger(__name__).error("%s", error)
        self.closed.set()
        self._wake.set()
        # The serving process is gone: nobody needs a step that still runs.
        if not self.finished.wait(EXIT_AFTER_S):
            os._exit(1)


def serve(inbox: Inbox, writer: FrameWriter, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
    """Build the engine and run it until the socket closes or a drain is complete."""
    from morph_runtime.engine.build import build_engine  # torch is imported only once the settings are known

    started = clock()
    engine = build_engine(config, wake=inbox.wake)
    engine.tell_starts(writer.send)
    # What is there now stays: a full collection that walks all of it would stop the steps for 0.1 s.
    gc.collect()
    gc.freeze()
    writer.send(engine.info(clock() - started))
    draining = False
    next_stats = 0.0
    active_s, checked_s = clock(), float("-inf")
    while not inbox.closed.is_set():
        for message in inbox.take():
            if isinstance(message, Submit):
                engine.submit(message)
            elif isinstance(message, Cancel):
                engine.cancel(message.key)
            elif isinstance(message, QueueSignal):
                engine.queue_signal(message)
            elif isinstance(message, SetMode):
                engine.set_mode(message.mode, message.cap)
            elif isinstance(message, Drain):
                draining = True
        level = engine.level
        output = engine.step()
        if output is not None:
            writer.send(output)
        now = clock()
        if now >= next_stats or engine.level != level:
            writer.send(engine.stats())
            next_stats = now + config.stats_interval_s
        idle = not engine.has_requests
        if output is not None or not idle or engine.level != level:
            active_s = now
        if idle:
            if draining:
                break
            pause = config.morph.interval_s if engine.level else next_stats - now
            woken = inbox.wait(SHIFT_POLL_S if engine.must_poll else min(config.stats_interval_s, pause))
            quiet = not woken and now - active_s >= QUIET_S
            if quiet and checked_s < active_s and now - checked_s >= CHECK_EVERY_S:
                engine.check_integrity()
                checked_s = now
        elif output is None:
            # Requests wait but none could run: only a finished shift or a message can change that.
            inbox.wait(SHIFT_POLL_S if engine.must_poll else config.morph.interval_s)
    engine.close()


def main(argv: list[str] | None = None) -> int:
    """Entry point of the engine process; returns its exit status."""
    parser = argparse.ArgumentParser(prog="morph_runtime.engine.process")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--server", type=int, default=0, help="our parent's parent; if it dies, so must our parent")
    given = parser.parse_args(argv)
    sock = socket.socket(fileno=given.fd)
    logging.basicConfig(
        level=log_level(os.environ),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # Ctrl-C reaches the whole process group; the serving process decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if given.server:
        OrphanGuard(given.server).start()
    writer = FrameWriter(sock)
    reader: FrameReader[ToEngine] = FrameReader(sock, msgspec.msgpack.Decoder(ToEngine))
    first = reader.receive()
    if not isinstance(first, Start):
        return 1
    inbox = Inbox(reader)
    try:
        serve(inbox, writer, EngineConfig.from_mapping(json.loads(first.config)))
    except ConfigError as error:
        return _fail(writer, EngineFailure(message=str(error), user_error=True))
    except EngineDown:
        return 0
    except Exception as error:  # the serving process must learn why, whatever it was
        logging.getLogger(__name__).exception("the engine has failed")
        return _fail(writer, EngineFailure(message=f"The engine has failed: {type(error).__name__}: {error}"))
    finally:
        inbox.finished.set()
    return 0


def _fail(writer: FrameWriter, failure: EngineFailure) -> int:
    try:
        writer.send(failure)
    except EngineDown:
        logging.getLogger(__name__).warning("nobody is left to hear: %s", failure.message)
    return 1


if __name__ == "__main__":
    sys.exit(main())
