"""Addresses: what a user may write, and the metrics endpoint that goes with a gRPC endpoint."""

from __future__ import annotations

from urllib.parse import urlsplit

from morph_client.errors import BadInput

DEFAULT_URL = "localhost:8001"
METRICS_PORT = 8002


def grpc_target(url: str) -> str:
    """``host:port`` for gRPC; a leading ``grpc://`` is dropped. Raises :class:`BadInput` for anything else."""
    text = url.removeprefix("grpc://").rstrip("/")
    if "://" in text:
        raise BadInput(f"'{url}' is not a gRPC address: write host:port, such as {DEFAULT_URL}")
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise BadInput(f"'{url}' has no valid port: write host:port, such as {DEFAULT_URL}") from None
    if not host or parts.path or " " in text:
        raise BadInput(f"'{url}' is not a gRPC address: write host:port, such as {DEFAULT_URL}")
    return text if port is not None else f"{text}:8001"


def metrics_url_for(target: str) -> str:
    """The metrics page of the same host, on Triton's usual port. ``target`` is what :func:`grpc_target` returned."""
    host = urlsplit(f"//{target}").hostname or "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{METRICS_PORT}/metrics"
