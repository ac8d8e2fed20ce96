"""A small stand-in for Triton with the model ``morph``: real gRPC, a metrics page, the wire contract's tensors.

What it does is chosen by the prompt's first word; every other prompt is answered with ``max_tokens`` words.
Run as a program, it plays the launcher: it reads MORPH_* and serves until SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

LAYERS = 8
CACHED_TOKENS = 1
LINGER_S = 0.2
"""How long after its last response a stream ends whose prompt has the word "lingering"."""
REFUSALS = {
    "refuse": (grpc.StatusCode.INVALID_ARGUMENT, "temperature must be at least 0"),
    "full": (grpc.StatusCode.UNAVAILABLE, "[request id: 7] Exceeds maximum queue size"),
    "late": (grpc.StatusCode.UNAVAILABLE, "Request timeout expired"),
    "dead": (grpc.StatusCode.UNAVAILABLE, "Model is unavailable due to unhealthy vLLM engine: it is gone."),
    "broken": (grpc.StatusCode.INTERNAL, "The engine could not finish it."),
    "dropped": (grpc.StatusCode.CANCELLED, "Request was cancelled"),
}


def bytes_tensor(*items: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def response(outputs: dict[str, tuple[str, bytes]], final: bool) -> Any:
    """A stream response with these tensors, given as (datatype, raw bytes)."""
    message = pb.ModelStreamInferResponse()
    inner = message.infer_response
    for name, (datatype, raw) in outputs.items():
        inner.outputs.add(name=name, datatype=datatype, shape=[1])
        inner.raw_output_contents.append(raw)
    inner.parameters["triton_final_response"].bool_param = final
    return message


def text_response(
    text: str, *, prompt_tokens: int, level: int, last: bool, final: bool, n: int = 1, lean: bool = False
) -> Any:
    """One token of each of `n` outputs; `lean`: without what does not change."""
    share = json.dumps({"full": 1 - level / LAYERS, "w8": 0.0, "w4": level / LAYERS}).encode()
    texts = [f"{number}:{text}" if number else text for number in range(n)]
    outputs = {
        "text_output": ("BYTES", bytes_tensor(*(item.encode() for item in texts))),
        "finish_reason": ("BYTES", bytes_tensor(*[b"length" if last else b"None"] * n)),
        "num_input_tokens": ("UINT32", struct.pack("<I", prompt_tokens)),
        "num_output_tokens": ("UINT32", struct.pack(f"<{n}I", *[1] * n)),
        "num_cached_tokens": ("UINT32", struct.pack("<I", CACHED_TOKENS)),
        "morph_level": ("INT32", struct.pack(f"<{n}i", *[level] * n)),
        "rung_share": ("BYTES", bytes_tensor(*[share] * n)),
    }
    left_out = ("finish_reason", "num_input_tokens", "num_cached_tokens") if lean else ()
    return response({name: tensor for name, tensor in outputs.items() if name not in left_out}, final)


class FakeService(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers streams; remembers what it was sent and what was cancelled."""

    def __init__(self, slots: int = 64, token_s: float = 0.001, level: int = 0, falls_idle: bool = False) -> None:
        self.requests: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.arrived = threading.Semaphore(0)
        self.answered = 0  # streams that ended by themselves
        self.cancelled = threading.Semaphore(0)
        self.hanging: list[threading.Event] = []  # each ends a "hang"
        self.context: int | None = None  # in words; None takes any length
        self.level = level
        self.falls_idle = falls_idle
        self.token_s = token_s
        self.running = 0
        self.waiting = 0
        self.tokens = 0
        self._slots = threading.Semaphore(slots)
        self._lock = threading.Lock()

    def ModelReady(self, request: Any, context: Any) -> Any:
        self.headers.append(dict(context.invocation_metadata()))
        return pb.ModelReadyResponse(ready=request.name == "morph")

    def ModelStreamInfer(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:
        answered = threading.Event()
        # gRPC drops the generator of a cancelled call without a word, so the call itself is watched.
        context.add_callback(lambda: None if answered.is_set() else self.cancelled.release())
        self.headers.append(dict(context.invocation_metadata()))
        lingers = False
        for request in request_iterator:
            self.requests.append(request)
            self.arrived.release()
            texts = {
                tensor.name: raw[4:].decode()
                for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
                if tensor.datatype == "BYTES"
            }
            lingers = "lingering" in texts["text_input"]
            lean = "lean_chunks" in request.parameters and request.parameters["lean_chunks"].bool_param
            yield from self._answer(texts["text_input"], json.loads(texts["sampling_parameters"]), context, lean)
        if lingers:
            time.sleep(LINGER_S)
        self.answered += 1
        answered.set()

    def _answer(self, prompt: str, sampling: dict[str, Any], context: Any, lean: bool) -> Iterator[Any]:
        word = prompt.split()[0] if prompt.split() else ""
        if word in REFUSALS:
            code, words = REFUSALS[word]
            if "as-a-status" in prompt:
                context.abort(code, words)
            yield pb.ModelStreamInferResponse(error_message=words)
            return
        if word == "hang":
            over = threading.Event()
            self.hanging.append(over)
            context.add_callback(over.set)
            over.wait(300)
            return
        if word == "nonsense":
            yield response({"text_output": ("BYTES", b"\xff\xff\xff\xff")}, False)
            return
        count = sampling.get("max_tokens", 16)
        if self.context is not None and len(prompt.split()) + count > self.context:
            words = f"max_tokens {count} exceed the context of {self.context} tokens."
            yield pb.ModelStreamInferResponse(error_message=words)
            return
        with self._place():
            for i in range(count):
                time.sleep(0.02 if word == "slow" else self.token_s)
                if not context.is_active():
                    return
                last = i == count - 1 and word != "cut"
                self.tokens += 1
                yield text_response(
                    f"w{i} ",
                    prompt_tokens=len(prompt.split()),
                    level=self.level,
                    last=last,
                    final=last and word != "bare",
                    n=sampling.get("n", 1),
                    lean=lean and i > 0 and not last,
                )
        if word == "bare":  # as a model that ends with a response of flags only
            yield response({}, True)

    def _place(self) -> Any:
        service = self

        class Place:
            def __enter__(self) -> None:
                with service._lock:
                    service.waiting += 1
                service._slots.acquire()
                with service._lock:
                    service.waiting -= 1
                    service.running += 1

            def __exit__(self, *_: object) -> None:
                with service._lock:
                    service.running -= 1
                service._slots.release()

        return Place()

    def metrics_page(self, mode: str = "balanced") -> str:
        level = 0 if self.falls_idle and not self.running else self.level
        blocks = 64 + 8 * level
        labels = 'model="morph",version="1"'
        lines = [
            f"nv_inference_pending_request_count{{{labels}}} {self.waiting}",
            f"vllm:num_requests_running{{{labels}}} {self.running}",
            f"morph_requests_in_line{{{labels}}} 0",
            f"morph_level{{{labels}}} {level}",
            f"morph_level_max{{{labels}}} {LAYERS}",
            f"morph_kv_blocks_capacity{{{labels}}} {blocks}",
            f"morph_kv_blocks_used{{{labels}}} {min(blocks, self.running * 10)}",
            f"morph_kv_blocks_base{{{labels}}} 64",
            f"morph_kv_block_tokens{{{labels}}} 16",
            f'morph_kv_dtype{{{labels},dtype="int8"}} 1',
            f"morph_engine_up{{{labels}}} 1",
            f'morph_mode{{{labels},mode="{mode}"}} 1',
            f'morph_shifts_total{{{labels},direction="down",rung="w4"}} {level}',
            f'morph_decisions_total{{{labels},action="down",reason="kv_pressure"}} {level}',
            f'morph_decisions_total{{{labels},action="hold",reason="slo_met"}} 900',
            f"morph_preemptions_total{{{labels}}} 0",
            f"vllm:generation_tokens_total{{{labels}}} {self.tokens}",
            f'morph_tokens_total{{{labels},rung="full"}} {self.tokens}',
            f'morph_memory_bytes{{{labels},kind="weights"}} 104857600',
            f'morph_memory_bytes{{{labels},kind="budget"}} 209715200',
            f'vllm:time_to_first_token_seconds_bucket{{{labels},le="0.1"}} 5',
            f'vllm:time_to_first_token_seconds_bucket{{{labels},le="1"}} 10',
            f'vllm:time_to_first_token_seconds_bucket{{{labels},le="+Inf"}} 10',
            f"vllm:time_to_first_token_seconds_sum{{{labels}}} 3.5",
        ]
        lines += [f'morph_layer_bits{{{labels},layer="{i}"}} {4 if i < level else 16}' for i in range(LAYERS)]
        return "# TYPE morph_level gauge\n" + "\n".join(lines) + "\n"


class FakeTriton:
    """The service with its ports. Port 0 picks a free one."""

    def __init__(self, service: FakeService, mode: str = "balanced", ports: tuple[int, int, int] = (0, 0, 0)) -> None:
        self.service = service
        self._grpc = grpc.server(futures.ThreadPoolExecutor(96))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, self._grpc)
        self.grpc_port = self._grpc.add_insecure_port(f"localhost:{ports[1]}")
        pages = {"/v2/models/morph/ready": lambda: "", "/metrics": lambda: service.metrics_page(mode)}

        class Pages(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = pages.get(self.path)
                self.send_response(404 if page is None else 200)
                self.end_headers()
                if page is not None:
                    self.wfile.write(page().encode())

            def log_message(self, *_: object) -> None:
                """Says nothing: test output is for failures."""

        # Two servers as in Triton, of which the tests mostly need one.
        self._http = [ThreadingHTTPServer(("localhost", port), Pages) for port in (ports[0], ports[2])]
        self.metrics_port = self._http[1].server_address[1]

    @property
    def url(self) -> str:
        return f"localhost:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://localhost:{self.metrics_port}/metrics"

    def start(self) -> None:
        self._grpc.start()
        for server in self._http:
            threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()

    def stop(self) -> None:
        self._grpc.stop(None).wait(60)
        for server in self._http:
            server.shutdown()
            server.server_close()


def main() -> None:
    """The launcher's part. MORPH_FAKE says what should go wrong, if anything."""
    if os.environ.get("MORPH_FAKE") == "fails":
        print("the model folder does not exist", file=sys.stderr)
        raise SystemExit(3)
    mode = os.environ["MORPH_MODE"]
    service = FakeService(
        slots=1 if mode == "off" else 8, token_s=0.004, level=0 if mode == "off" else 6, falls_idle=True
    )
    names = ("MORPH_HTTP_PORT", "MORPH_GRPC_PORT", "MORPH_METRICS_PORT")
    triton = FakeTriton(service, mode, tuple(int(os.environ[name]) for name in names))  # type: ignore[arg-type]
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    if os.environ.get("MORPH_FAKE") == "never-ready":
        over.wait()
        return
    triton.start()
    over.wait()
    os._exit(0)  # at once: gRPC would wait for streams whose client is gone


if __name__ == "__main__":
    main()
