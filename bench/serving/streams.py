"""Static batches of streams, in the engine alone and through Triton: inter-token latency, tokens per second, TTFT.

Through Triton several client processes share the streams, so that one Python interpreter is not what is measured.
As a program (`--worker`) this is such a client: settings come as one line of JSON on its standard input.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from served import Prompts, Target

from morph_client.aio_client import AsyncMorphClient
from morph_client.stats import percentile
from morph_client.types import SamplingParams

Arrivals = list[tuple[float, int]]
"""(when, by time.monotonic, which all processes share; tokens) of one stream."""


def figures(sent: Sequence[float], streams: Sequence[Arrivals]) -> dict[str, float]:
    """Of a batch: gaps and tokens while all of it decodes; times to first token.

    If the first streams have ended before the last ones begin, `together` is 0, and gaps and tokens are those from the
    first token of all to the last. A chunk of several tokens counts as one gap and then gaps of 0, as its reader sees
    it.

    Raises:
        SystemExit: there are no gaps, for each stream came in one chunk.
    """
    firsts, lasts = [stream[0][0] for stream in streams], [stream[-1][0] for stream in streams]
    begin, end = max(firsts), min(lasts)
    gaps, tokens = _within(streams, begin, end)
    together = bool(gaps)
    if not together:
        begin, end = min(firsts), max(lasts)
        gaps, tokens = _within(streams, begin, end)
    steps = [gap for gap in gaps if gap > 0]
    if not steps:
        raise SystemExit("each stream came in one chunk: more output tokens are needed")
    ttft = [(first - at) * 1e3 for at, first in zip(sent, firsts, strict=True)]
    return {
        "together": float(together),
        "streams": len(streams), "window_s": end - begin, "tok_s": tokens / (end - begin),
        "itl_mean_ms": sum(gaps) / len(gaps), "itl_p50_ms": percentile(steps, 50), "itl_p99_ms": percentile(steps, 99),
        "itl_max_ms": max(gaps), "tokens_per_chunk": tokens / len(steps),
        "ttft_p50_ms": percentile(ttft, 50), "ttft_p99_ms": percentile(ttft, 99),
    }  # fmt: skip


def _within(streams: Sequence[Arrivals], begin: float, end: float) -> tuple[list[float], int]:
    """Gaps in ms, and tokens after them, between two times."""
    gaps, tokens = [], 0
    for stream in streams:
        for (before, _), (at, count) in itertools.pairwise(stream):
            if begin <= before and at <= end:
                gaps += [(at - before) * 1e3] + [0.0] * (count - 1)
                tokens += count
    return gaps, tokens


def repeats(size: int) -> int:
    """How often a batch of so many streams is measured: a few of them say little about times to first token."""
    return max(1, 10 // size)


def middle(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


class Workers:
    """Client processes that share the streams of a batch."""

    def __init__(self, count: int, url: str, target: Target, folder: Path) -> None:
        self._setup = {"url": url, "target": vars(target), "folder": str(folder)}
        self._workers = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
            for _ in range(count)
        ]  # fmt: skip
        for number, _ in enumerate(self._workers):
            self._tell(number, self._setup)

    def batch(self, size: int, prompt_tokens: int, output_tokens: int) -> tuple[list[float], list[Arrivals]]:
        """`size` streams at once: when each was sent, and what came."""
        count = min(size, len(self._workers))
        for number in range(count):
            indices = list(range(number, size, count))
            self._tell(number, {"indices": indices, "prompt": prompt_tokens, "output": output_tokens})
        for number in range(count):
            self._hear(number)  # connected, prompts made
        start = time.monotonic() + 0.2
        for number in range(count):
            self._tell(number, {"start": start})
        sent: list[float] = []
        streams: list[Arrivals] = []
        for number in range(count):
            for one in self._hear(number)["streams"]:
                sent.append(one["sent"])
                streams.append([(at, tokens) for at, tokens in one["arrivals"]])
        return sent, streams

    def close(self) -> None:
        """End them."""
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait(30)

    def _tell(self, number: int, message: dict[str, Any]) -> None:
        pipe = self._workers[number].stdin
        assert pipe is not None
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    def _hear(self, number: int) -> dict[str, Any]:
        pipe = self._workers[number].stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise SystemExit("a client process has ended: its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


async def _stream(client: AsyncMorphClient, prompt: str, output: int) -> dict[str, Any]:
    # No min_tokens: it would ban tokens, and on a GPU such rows are sampled on the host.
    sampling = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
    sent, arrivals = time.monotonic(), []
    async with client.stream(prompt, sampling=sampling) as chunks:
        async for chunk in chunks:
            if chunk.tokens:
                arrivals.append((time.monotonic(), chunk.tokens))  # noqa: PERF401 - the time is that of the chunk
    return {"sent": sent, "arrivals": arrivals}


async def _worker() -> None:
    setup = json.loads(sys.stdin.readline())
    prompts = Prompts(Target(**setup["target"]), Path(setup["folder"]), seed=0)
    async with AsyncMorphClient(setup["url"]) as client:
        await client.server_ready()
        while line := await asyncio.to_thread(sys.stdin.readline):
            job = json.loads(line)
            texts = [prompts.maker.make(job["prompt"], index) for index in job["indices"]]
            print("{}", flush=True)
            start = json.loads(await asyncio.to_thread(sys.stdin.readline))["start"]
            await asyncio.sleep(start - time.monotonic())
            streams = await asyncio.gather(*(_stream(client, text, job["output"]) for text in texts))
            print(json.dumps({"streams": streams}), flush=True)


if __name__ == "__main__":
    asyncio.run(_worker())
