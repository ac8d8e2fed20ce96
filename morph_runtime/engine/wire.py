"""Frames over the socket between the serving process and the engine process.

A frame is a 4-byte little-endian length followed by one MessagePack message. MessagePack with
typed structs: no pickle, so a frame can never carry code.
"""

from __future__ import annotations

import socket
import threading
from typing import Generic, TypeVar

import msgspec

from morph_runtime.errors import EngineDown

T = TypeVar("T")
LENGTH_BYTES = 4
MAX_FRAME_BYTES = 1 << 30


class FrameWriter:
    """Sends messages; safe to call from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: msgspec.Struct) -> None:
        """Send one message, blocking until the kernel has taken it.

        Raises:
            EngineDown: the other side is gone.
        """
        body = self._encoder.encode(message)
        try:
            with self._lock:
                self._sock.sendall(len(body).to_bytes(LENGTH_BYTES, "little") + body)
        except OSError as error:
            raise EngineDown(f"The connection to the other process is closed ({error.strerror or error}).") from None


class FrameReader(Generic[T]):
    """Receives messages of the union type `T`; one thread only."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._sock = sock
        self._decoder = decoder

    def receive(self) -> T | None:
        """The next message, or None when the other side has closed.

        Raises:
            TimeoutError: the socket has a timeout and it passed.
            EngineDown: the frame is not one of ours.
        """
        head = self._exactly(LENGTH_BYTES)
        if head is None:
            return None
        size = int.from_bytes(head, "little")
        if size > MAX_FRAME_BYTES:
            raise EngineDown(f"A frame of {size} bytes is above the limit of {MAX_FRAME_BYTES}.")
        body = self._exactly(size)
        if body is None:
            return None
        try:
            return self._decoder.decode(body)
        except msgspec.DecodeError as error:
            raise EngineDown(f"A frame could not be read: {error}.") from None

    def _exactly(self, count: int) -> bytearray | None:
        data = bytearray(count)
        view = memoryview(data)
        done = 0
        while done < count:
            try:
                got = self._sock.recv_into(view[done:])
            except TimeoutError:
                raise
            except OSError:
                return None
            if got == 0:
                return None
            done += got
        return data
