"""Addresses: what a user may write, and the metrics endpoint that goes with a gRPC endpoint."""

from __future__ import annotations

from urllib.parse import urlsplit

from morph_client.errors import BadInput

GRPC_PORT = 8001
METRICS_PORT = 8002
DEFAULT_URL = f"localhost:{GRPC_PORT}"


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
    return text if port is not None else f"{text}:{GRPC_PORT}"


def metrics_url_for(target: str, port: int = METRICS_PORT) -> str:
    """The metrics page of the same host. ``target`` is what :func:`grpc_target` returned."""
    host = urlsplit(f"//{target}").hostname or "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
