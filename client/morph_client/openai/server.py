"""Runs the application until it is told to end."""

from __future__ import annotations

import signal
import socket

import uvicorn
from fastapi import FastAPI

from morph_client.errors import BadInput


def serve(app: FastAPI, host: str, port: int, drain_s: int) -> None:
    """Serves on ``host:port`` until SIGINT or SIGTERM; open answers then get ``drain_s`` seconds to end.

    Raises :class:`BadInput` if the address cannot be used.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=drain_s,
    )
    listening = listen(host, port)
    # uvicorn sends itself the signal that ended it once more when all is done: it must find someone who ignores it.
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    try:
        uvicorn.Server(config).run([listening])
    finally:
        listening.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket of our own: uvicorn tells of a port in use with a log line and leaves with a status of its own."""
    try:
        # With the protocol named (6, not 0) asyncio sends small pieces at once; else each first token waits 40 ms.
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(2048)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise BadInput(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listening
