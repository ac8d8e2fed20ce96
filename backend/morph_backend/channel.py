"""One request's way back to its client, with Triton's two deadly mistakes made impossible.

Polling a sender for cancellation after its FINAL response crashes the whole server, and a request
without a FINAL pins the model for ever. So one lock covers the poll and every send, and whatever
happens exactly one FINAL goes out.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from enum import Enum
from typing import Any

import triton_python_backend_utils as pb_utils

from morph_backend.send_watch import SendTimes


class Status(Enum):
    """Triton's status of an error; the values are names because Triton fills its module in after our import."""

    INVALID_ARG = "INVALID_ARG"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class ResponseChannel:
    """Wraps Triton's response sender. Safe to use from several threads."""

    def __init__(self, sender: Any, times: SendTimes | None = None) -> None:
        """`times` is told of each send."""
        self._sender = sender
        self._times = times or SendTimes()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether FINAL has been sent (or is being sent)."""
        return self._closed

    def send(self, tensors: Sequence[Any], *, final: bool) -> bool:
        """Send output tensors.

        Returns:
            False if the channel was closed already; nothing is sent then.

        Raises:
            Exception: Triton refused a response that was not the final one; the channel is still open.
        """
        response = pb_utils.InferenceResponse(output_tensors=list(tensors))
        with self._lock:
            if self._closed:
                return False
            if final:
                self._finish(response)
            else:
                self._send(self._sender, response)
            return True

    def fail(self, status: Status, message: str) -> bool:
        """Send an error as the final response; False if the channel was closed already."""
        error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, status.value))
        response = pb_utils.InferenceResponse(output_tensors=[], error=error)
        with self._lock:
            if self._closed:
                return False
            self._finish(response)
            return True

    def is_cancelled(self) -> bool:
        """Whether the client has gone; False when closed, or when a send is under way (ask again later)."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return not self._closed and bool(self._sender.is_cancelled())
        finally:
            self._lock.release()

    def _send(self, sender: Any, *arguments: Any, **named: Any) -> None:
        self._times.begin()
        try:
            sender.send(*arguments, **named)
        finally:
            self._times.end()

    def _finish(self, response: Any) -> None:
        self._closed = True
        sender, self._sender = self._sender, None  # the request's memory in Triton goes with the last reference
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            self._send(sender, response, final)
        except Exception as error:  # noqa: BLE001 - whatever it was, the request must be closed
            logging.getLogger(__name__).warning("the final response could not be sent: %s", error)
            try:
                self._send(sender, flags=final)
            except Exception as second:  # noqa: BLE001 - nothing is left to try
                logging.getLogger(__name__).error("the request could not be closed: %s", second)
