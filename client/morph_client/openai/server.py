"""Runs the application until it is told to end."""

from __future__ import annotations

import gc
import signal
import socket

import uvicorn
from fastapi import FastAPI

from morph_client.errors import BadInput
from morph_client.openai.workers import Workers

KEEP_ALIVE_S = 75
"""How long an idle connection stays open. Longer than clients keep theirs (httpx: 5 s), or a request would sometimes
meet a connection that is just being closed."""


def serve(app: FastAPI, listening: socket.socket, drain_s: int, workers: int = 1) -> None:
    """Serves until SIGINT or SIGTERM, and closes ``listening``; open answers then get ``drain_s`` seconds to end.

    Raises:
        ServerError: one of several workers cannot start.
    """
    try:
        if workers == 1:
            _work(app, listening, drain_s)
        else:
            Workers(lambda: _work(app, listening, drain_s), workers).run()
    finally:
        listening.close()


def _work(app: FastAPI, listening: socket.socket, drain_s: int) -> None:
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=drain_s,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    # uvicorn sends itself the signal that ended it once more when all is done: it must find someone who ignores it.
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    # Modules and the tokenizer stay: a collection that looks through them holds every stream up for some 50 ms.
    gc.collect()
    gc.freeze()
    uvicorn.Server(config).run([listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket of our own: uvicorn tells of a port in use with a log line and leaves with a status of its own.

    Raises:
        BadInput: the address cannot be used.
    """
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
