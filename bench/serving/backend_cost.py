"""What the serving process itself does per request and per token, without Triton and without an engine.

    python bench/serving/backend_cost.py [--streams 256] [--tokens 200]

Requests are read, checked and tokenized as `execute()` does; then steps of one token for every stream arrive. Triton's
Python module is replaced by classes that keep nothing, so native work (shared memory, gRPC) is left out. First
each step waits until the one before is sent; then none waits, so streams are behind and their tokens are joined, as in
a loaded server. Prints microseconds of processor time.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import threading
import time
import types
from typing import Any

import numpy as np


class Plain:
    """Stands for a tensor, a response and an error."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments

    def name(self) -> str:
        return str(self.arguments[0])

    def as_numpy(self) -> Any:
        return self.arguments[1]


class Sender:
    """Counts responses."""

    def __init__(self) -> None:
        self.sent = 0
        self.final = threading.Event()

    def send(self, response: Any = None, flags: int = 0) -> None:
        self.sent += 1
        if flags:
            self.final.set()

    def is_cancelled(self) -> bool:
        return False


class Request:
    """One of Triton's requests."""

    def __init__(self, text: str, sampling: dict[str, Any]) -> None:
        fields = {"text_input": text.encode(), "sampling_parameters": json.dumps(sampling).encode()}
        self._inputs = [Plain(name, np.array([value], np.object_)) for name, value in fields.items()]
        self._inputs.append(Plain("stream", np.array([True])))

    def inputs(self) -> list[Any]:
        return self._inputs

    def parameters(self) -> str:
        return "{}"

    def request_id(self) -> str:
        return ""


def triton_module() -> types.ModuleType:
    """In place of Triton's own, which exists only inside its stub."""
    module = types.ModuleType("triton_python_backend_utils")
    vars(module).update(
        Tensor=Plain, InferenceResponse=Plain, TritonError=Plain, TRITONSERVER_RESPONSE_COMPLETE_FINAL=1
    )
    return module


class Engine:
    """Takes requests and does nothing with them."""

    def __init__(self) -> None:
        self.keys: list[int] = []

    def submit(self, request: Any) -> None:
        self.keys.append(request.key)

    def close(self) -> None:
        """Nothing to end."""


def measure(streams: int, tokens: int, waits: bool, model: str) -> dict[str, float]:
    """Microseconds of processor time per request and per token, and tokens in a response."""
    from morph_backend.inputs import read_request
    from morph_backend.recorder import MetricsRecorder
    from morph_backend.service import Service
    from morph_runtime.config import resolve_model_folder
    from morph_runtime.engine.messages import EngineInfo, Finished, StepOutput, TokenDelta
    from morph_runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(resolve_model_folder(model))
    service, engine = Service(tokenizer, MetricsRecorder(), line=streams), Engine()
    info = EngineInfo(
        model="", architecture="", device="cpu", dtype="bfloat16", num_layers=32, vocab_size=1 << 20, eos_token_ids=[],
        max_model_len=8192, max_num_seqs=streams, block_tokens=16, kv_dtype="bfloat16", base_blocks=64, level_max=32,
        ladder=["w8"], budget_bytes=1, start_s=0.0, max_num_batched_tokens=1 << 20,
    )  # fmt: skip
    service.attach(engine, info)  # type: ignore[arg-type]
    requests = [Request("Call me Ishmael. " * 8, {"max_tokens": tokens, "ignore_eos": True}) for _ in range(streams)]
    senders = [Sender() for _ in requests]
    began = time.process_time()
    for sender, request in zip(senders, requests, strict=True):
        service.handle(sender, functools.partial(read_request, request))
    taken = time.process_time() - began
    keys, rng = engine.keys, np.random.default_rng(0)
    words = rng.integers(300, 2000, (tokens, streams)).tolist()
    began = time.process_time()
    for at, row in enumerate(words):
        deltas = [TokenDelta(key, [token], [0]) for key, token in zip(keys, row, strict=True)]
        over = [Finished(key, "length") for key in keys] if at == tokens - 1 else []
        service.on_step(StepOutput(keys if at == 0 else [], deltas, over, 0, streams))
        if waits:
            while any(not queue.empty() for queue in service._senders._queues):
                time.sleep(0.0002)
    for sender in senders:
        sender.final.wait(60)
    spent = time.process_time() - began
    service.close()
    return {
        "us_per_request": taken / streams * 1e6, "us_per_token": spent / streams / tokens * 1e6,
        "tokens_per_response": streams * tokens / sum(sender.sent for sender in senders),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--model", default="models/morph-demo", help="folder whose tokenizer is used")
    given = parser.parse_args()
    sys.modules["triton_python_backend_utils"] = triton_module()
    for waits in (True, False):
        found = measure(given.streams, given.tokens, waits, given.model)
        print(json.dumps({"waits": waits, **{name: round(value, 2) for name, value in found.items()}}))


if __name__ == "__main__":
    main()
