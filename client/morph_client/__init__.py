"""Client of MorphServe on Triton: a blocking and an asyncio client, and the ``morph`` command.

from morph_client import MorphClient, SamplingParams

with MorphClient("localhost:8001") as client:
    for chunk in client.stream("Once upon a time", sampling=SamplingParams(max_tokens=64)):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

from morph_client.aio_client import AsyncMorphClient, AsyncTokenStream
from morph_client.errors import (
    BadInput,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    MissingDependency,
    MorphError,
    QueueFull,
    QueueTimeout,
    ServerError,
    ServerUnavailable,
)
from morph_client.prometheus import Histogram, Metrics
from morph_client.sync_client import MorphClient, TokenStream
from morph_client.types import (
    Chunk,
    Completion,
    CompletionOutput,
    OutputChunk,
    RungShare,
    SamplingParams,
    TokenLogprob,
)

__all__ = [
    "AsyncMorphClient",
    "AsyncTokenStream",
    "BadInput",
    "Cancelled",
    "Chunk",
    "Completion",
    "CompletionOutput",
    "DeadlineExceeded",
    "Histogram",
    "InvalidRequest",
    "Metrics",
    "MissingDependency",
    "MorphClient",
    "MorphError",
    "OutputChunk",
    "QueueFull",
    "QueueTimeout",
    "RungShare",
    "SamplingParams",
    "ServerError",
    "ServerUnavailable",
    "TokenLogprob",
    "TokenStream",
]
