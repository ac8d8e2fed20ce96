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

A look shows how many requests stand in the queue. Until as many have come in, the next nudge goes out
without another look, from the thread that ends `execute()`: it takes longer to come than the instance to
become idle. A nudge that comes before that wakes nobody: it lies in the queue, unanswered, until the next
one, which follows soon.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol


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
        backlog: Callable[[], int],
        *,
        sharers: int = 1,
        on_sent: Callable[[], None] = lambda: None,
        on_defect: Callable[[str], None] = lambda _thread: None,
        pause_s: float = 0.002,
        answer_s: float = 0.003,
        most_s: float = 0.1,
        idle_s: float = 1.0,
        retry_s: float = 5.0,
    ) -> None:
        """Start the thread.

        Args:
            connect: opens a NudgeStream; takes a listener that is called without arguments at each answer.
            backlog: how many requests stand in the queue; without any there is nothing to move.
            sharers: instances that take requests from it, this one included.
            on_sent: called after each nudge.
            on_defect: told the thread's name when something has raised in it.
            pause_s: how long the next request may take to come by itself after `execute()` has returned, or a nudge
                was answered.
            answer_s: how long to wait for a nudge's effect before the next (the instance may not be idle yet).
                Doubles with each further one.
            most_s: the longest wait that the doubling leads to.
            idle_s: the stream is closed after this long without a need: nobody in `execute()`, every nudge answered.
            retry_s: pause after the server could not be reached.
        """
        self._sharers = sharers
        self._connect, self._backlog, self._on_sent, self._on_defect = connect, backlog, on_sent, on_defect
        self._pause_s, self._answer_s, self._most_s = pause_s, answer_s, most_s
        self._idle_s, self._retry_s = idle_s, retry_s
        self._condition = threading.Condition()
        self._entered = 0
        self._left = 0
        self._handled = 0  # the value of _left that was last looked after
        self._queued_to = 0  # the value of _entered once those have come in that were seen in the queue
        self._unanswered = 0  # nudges, of the present stream
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
        """`execute()` is about to return; nudges if requests are known to stand in the queue."""
        with self._condition:
            self._left += 1
            if self._queued_to > self._left and self._stream is not None and not self._closed:
                try:
                    self._send(self._stream)
                except Exception as error:  # noqa: BLE001 - the thread meets it too, and gives up
                    logging.getLogger(__name__).debug("no nudge out of execute(): %s", error)
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
                if idle and (self._unanswered > 0 or self._entered > self._left):
                    continue  # the server could end the stream only once it has taken the next request
                left = self._handled = self._left
            if idle:
                self._drop_stream()
            else:
                self._follow(left)
        self._drop_stream()

    def _follow(self, left: int) -> None:
        """`execute()` has returned for the `left`th time: see to it that the next request comes, if there is one."""
        known = self._queued_to > left
        if known and self._stream is not None and self._settles(left, self._answer_s):
            known = False  # the nudge that came with the return has had its effect, or found nobody
        if self._someone_came(left, 0.0 if known else self._pause_s):
            return
        pause_s = self._pause_s
        while known or self._look(left):
            if not self._nudge(left) or self._someone_came(left, pause_s):
                return
            # The nudge was answered and nobody came. What was known to be queued may have been cancelled since.
            known, pause_s = False, min(2 * pause_s, self._most_s)

    def _look(self, left: int) -> bool:
        """Whether requests stand in the queue."""
        count = self._backlog()
        self._queued_to = left + -(-count // self._sharers)
        return count > 0

    def _someone_came(self, left: int, timeout_s: float) -> bool:
        """Whether a request comes (or has come already) after `left` of them have gone."""
        with self._condition:
            return self._condition.wait_for(lambda: self._entered > left or self._closed, timeout_s)

    def _nudge(self, left: int) -> bool:
        """Nudge until a request comes in or all nudges are answered; False if the server cannot be reached."""
        wait_s = self._answer_s
        while True:
            try:
                if self._stream is None:
                    self._unanswered = 0  # the stream before it has said its last word
                    self._stream = self._connect(self._on_answer)
                self._send(self._stream)
            except Exception as error:  # noqa: BLE001 - whatever the transport raises, serving goes on without nudges
                self._give_up(error)
                return False
            if self._settles(left, wait_s):
                return True
            wait_s = min(2 * wait_s, self._most_s)

    def _send(self, stream: NudgeStream) -> None:
        with self._condition:
            self._unanswered += 1
        stream.send()
        self._on_sent()

    def _settles(self, left: int, timeout_s: float) -> bool:
        """Whether within this time a request comes, or every nudge is answered."""
        with self._condition:
            return self._condition.wait_for(
                lambda: self._unanswered <= 0 or self._entered > left or self._closed, timeout_s
            )

    def _on_answer(self) -> None:
        with self._condition:
            self._unanswered -= 1
            if self._unanswered <= 0:
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
