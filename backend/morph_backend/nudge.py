"""Keeps Triton's queue moving: without it a queued request may wait half a second for nothing.

A model with a queue policy (priorities, timeouts, a maximum size) gets its requests one by one, when
its instance is idle. Triton's batcher learns of a *new request* at once, but that the instance has
become idle it learns only by looking again, every 500 ms (`DynamicBatchScheduler`, release 24.10). A
backlog then drains at two requests per second: 20 requests of 20 ms each took 4 to 6 s, with this
module 0.2 s.

So after `execute()` has returned and no other request has come in, we send one that Triton ends by
itself: highest priority, timeout one microsecond. Its arrival wakes the batcher, which first rejects
it (expired) and then takes the request at the head. It never reaches the model. Its trace is one
count of `nv_inference_request_failure{reason="REJECTED"}` per nudge, so we first look whether
anything is queued at all.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Protocol

HIGHEST_PRIORITY = 1
EXPIRED_AT_ONCE_US = 1


class NudgeStream(Protocol):
    """A way to put an expired request into the queue."""

    def send(self) -> None:
        """Send one; its answer is reported to the listener. Raises OSError when the server cannot be reached."""

    def close(self) -> None:
        """Release the connection. An open stream would keep Triton from unloading the model."""


class QueueNudger:
    """Watches `execute()` come and go and nudges when the queue may have stopped. One thread."""

    def __init__(
        self,
        connect: Callable[[Callable[[], None]], NudgeStream],
        backlog: Callable[[], bool],
        *,
        on_sent: Callable[[], None] = lambda: None,
        on_defect: Callable[[str], None] = lambda _thread: None,
        pause_s: float = 0.002,
        answer_s: float = 0.02,
        idle_s: float = 1.0,
        retry_s: float = 5.0,
    ) -> None:
        """Start the thread.

        Args:
            connect: opens a NudgeStream; takes a listener that is called without arguments at each answer.
            backlog: whether requests stand in the queue; without any there is nothing to move.
            on_sent: called after each nudge.
            on_defect: told the thread's name when something has raised in it.
            pause_s: how long the next request may take to come by itself after `execute()` has returned.
            answer_s: how long to wait for a nudge's effect before the next (the instance may not be idle yet).
            idle_s: the stream is closed after this long without a need.
            retry_s: pause after the server could not be reached.
        """
        self._connect, self._backlog, self._on_sent, self._on_defect = connect, backlog, on_sent, on_defect
        self._pause_s, self._answer_s, self._idle_s, self._retry_s = pause_s, answer_s, idle_s, retry_s
        self._condition = threading.Condition()
        self._entered = 0
        self._left = 0
        self._handled = 0  # the value of _left that was last looked after
        self._answered = 0
        self._closed = False
        self._stream: NudgeStream | None = None
        self._warned = False
        self._thread = threading.Thread(target=self._live, name="queue-nudger", daemon=True)
        self._thread.start()

    def entered(self) -> None:
        """`execute()` has been called."""
        with self._condition:
            self._entered += 1
            self._condition.notify()

    def left(self) -> None:
        """`execute()` is about to return."""
        with self._condition:
            self._left += 1
            self._condition.notify()

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread and close the stream; a server that does not answer is left after `timeout_s`."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join(timeout_s)

    def _live(self) -> None:
        while not self._closed:
            try:
                self._run()
            except Exception as error:
                logging.getLogger(__name__).exception("the nudger begins anew")
                self._on_defect(self._thread.name)
                self._give_up(error)

    def _run(self) -> None:
        while True:
            with self._condition:
                idle = not self._condition.wait_for(
                    lambda: self._left != self._handled or self._closed, self._idle_s if self._stream else None
                )
                if self._closed:
                    break
                left = self._handled = self._left
            if idle:
                self._drop_stream()
            elif not self._someone_came(left, self._pause_s) and self._backlog():
                self._nudge_until_answered(left)
        self._drop_stream()

    def _someone_came(self, left: int, timeout_s: float) -> bool:
        """Whether a request comes (or has come already) after `left` of them have gone."""
        with self._condition:
            return self._condition.wait_for(lambda: self._entered > left or self._closed, timeout_s)

    def _nudge_until_answered(self, left: int) -> None:
        """Nudge until a request comes in, or the nudge is answered: then the queue was empty."""
        while True:
            answered = self._answered
            try:
                if self._stream is None:
                    self._stream = self._connect(self._on_answer)
                self._stream.send()
            except Exception as error:  # noqa: BLE001 - whatever the transport raises, serving goes on without nudges
                self._give_up(error)
                return
            self._on_sent()
            with self._condition:
                if self._condition.wait_for(functools.partial(self._settled, answered, left), self._answer_s):
                    return

    def _settled(self, answered: int, left: int) -> bool:
        return self._answered != answered or self._entered > left or self._closed

    def _on_answer(self) -> None:
        with self._condition:
            self._answered += 1
            self._condition.notify()

    def _give_up(self, error: Exception) -> None:
        self._drop_stream()
        if not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(
                "Triton's queue cannot be nudged (%s): a queued request may wait up to 500 ms longer. "
                "Set MORPH_GRPC_PORT to Triton's gRPC port.",
                error,
            )
        with self._condition:
            self._condition.wait_for(lambda: self._closed, self._retry_s)

    def _drop_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                stream.close()
            except Exception as error:  # noqa: BLE001 - it is gone either way
                logging.getLogger(__name__).debug("a nudge stream did not close cleanly: %s", error)


class GrpcNudgeStream:
    """Nudges over a gRPC stream of `tritonclient`."""

    def __init__(self, address: str, model: str, on_answer: Callable[[], None]) -> None:
        """Open the stream to `address` (host:port)."""
        # Imported here: the first nudge pays for it, not the start of the model.
        import numpy as np
        from tritonclient import grpc

        self._client = grpc.InferenceServerClient(address)
        # Empty, so that even without a queue timeout it would be refused, not served.
        text = grpc.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([b""], dtype=np.object_))
        self._inputs = [text]
        self._model = model
        self._client.start_stream(lambda result, error: on_answer())

    def send(self) -> None:
        """Put one expired request into the queue."""
        self._client.async_stream_infer(
            self._model, self._inputs, priority=HIGHEST_PRIORITY, timeout=EXPIRED_AT_ONCE_US
        )

    def close(self) -> None:
        """Close the stream."""
        self._client.stop_stream()
        self._client.close()
