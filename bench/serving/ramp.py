"""A burst of streams through Triton into an engine that costs nothing: what queue, serving process and gRPC take.

    python bench/serving/ramp.py [--streams 64] [--tokens 300] [--step-ms 6] [--clients 1] [--repeat 3] [--json FILE]

The engine is the tests' own: a step takes `--step-ms`, whatever is in it, and gives each stream a token. All streams
are asked for at the same moment, by so many client processes. Prints a line per burst: TTFT from the asking, tokens per
second from the first token of all to the last, tokens in a chunk, and processor seconds of Triton and of its stub.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "triton")]

from morph_client.aio_client import AsyncMorphClient  # noqa: E402
from morph_client.stats import percentile  # noqa: E402
from morph_client.types import SamplingParams  # noqa: E402
from tiny_model import write_tiny_model  # noqa: E402
from triton_server import TritonServer, fake_repository  # noqa: E402

LEAD_S = 2.5
"""Until the burst: client processes start and connect meanwhile."""


async def burst(url: str, streams: int, tokens: int, start: float) -> list[tuple[float, float, float, int]]:
    """For each stream: when it was asked for, its first and last chunk (time.monotonic), and its chunks."""

    async def one(client: AsyncMorphClient, number: int) -> tuple[float, float, float, int]:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
        asked, times = time.monotonic(), []
        async with client.stream(f"hello world {number}", sampling=sampling) as chunks:
            async for chunk in chunks:
                if chunk.tokens:
                    times.append(time.monotonic())  # noqa: PERF401 - the time is that of the chunk
        return asked, times[0], times[-1], len(times)

    async with AsyncMorphClient(url) as client:
        await one(client, 0)
        await asyncio.sleep(start - time.monotonic())
        return await asyncio.gather(*(one(client, number) for number in range(streams)))


def run(server: TritonServer, given: argparse.Namespace) -> dict[str, Any]:
    """One burst."""
    start = time.monotonic() + LEAD_S
    command = [
        sys.executable,
        __file__,
        "--streams",
        str(given.streams // given.clients),
        "--tokens",
        str(given.tokens),
    ]
    command += ["--worker", f"127.0.0.1:{server.grpc}", "--start", str(start)]
    processes = {
        process: process.cpu_times() for process in psutil.Process(server.process.pid).children(recursive=True)
    }
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(given.clients)]
    rows = [row for worker in workers for row in json.loads(worker.communicate()[0])]
    spent: dict[str, float] = {}
    for process, before in processes.items():
        if process.is_running():
            now, name = process.cpu_times(), process.name()
            spent[name] = spent.get(name, 0.0) + now.user + now.system - before.user - before.system
    ttft_ms = [(first - asked) * 1e3 for asked, first, _, _ in rows]
    seconds = max(last for _, _, last, _ in rows) - min(first for _, first, _, _ in rows)
    return {
        "ttft_p50_ms": percentile(ttft_ms, 50), "ttft_p99_ms": percentile(ttft_ms, 99),
        "tok_s": len(rows) * given.tokens / seconds,
        "tokens_per_chunk": len(rows) * given.tokens / sum(chunks for _, _, _, chunks in rows),
        "triton_cpu_s": spent.get("tritonserver", 0.0), "stub_cpu_s": spent.get("triton_python_backend_stub", 0.0),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=300, help="of each stream; at most 480")
    parser.add_argument("--step-ms", type=float, default=6.0)
    parser.add_argument("--clients", type=int, default=1, help="client processes")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(asyncio.run(burst(given.worker, given.streams, given.tokens, given.start))))
        return
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            "MORPH_MODEL": str(write_tiny_model(folder / "model")), "FAKE_STEP_MS": f"{given.step_ms:g}",
            "MORPH_MODEL_REPOSITORY": str(fake_repository(folder / "repository")), "MORPH_MAX_NUM_SEQS": "256",
        }  # fmt: skip
        server = TritonServer(folder, environment)
        try:
            server.wait_ready().wait_metrics()
            for _ in range(given.repeat):
                found.append({name: round(value, 2) for name, value in run(server, given).items()})
                print(found[-1], flush=True)
        finally:
            server.stop()
    if given.json is not None:
        given.json.write_text(json.dumps({"settings": vars(given), "bursts": found}, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
