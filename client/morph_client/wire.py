"""The wire: requests to tensors, responses to chunks. Knows Triton's messages and nothing of connections."""

from __future__ import annotations

import json
import math
import struct
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import service_pb2

from morph_client.errors import InvalidRequest, ServerError
from morph_client.types import Chunk, OutputChunk, RungShare, SamplingParams, TokenLogprob

_LARGEST_MESSAGE = 2**31 - 1
_ALWAYS_ASKED = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
_DETAILS = ("return_morph_level", "return_rung_share", "return_num_cached_tokens")
_SCORES = ("return_logprobs",)
_PROMPT_SCORES = ("return_prompt_logprobs",)
_NULL = b"null"


@dataclass(frozen=True)
class Request:
    """One checked request; either client sends its message."""

    model: str
    request_id: str
    texts: tuple[tuple[str, str], ...]
    flags: tuple[str, ...]
    priority: int
    timeout_us: int | None
    slo_class: str | None
    settings: tuple[tuple[str, str], ...] = ()
    """Request parameters of the administrator."""

    def to_message(self) -> Any:
        """As a ``ModelInferRequest``."""
        message = service_pb2.ModelInferRequest(model_name=self.model, id=self.request_id)
        for name, text in self.texts:
            raw = text.encode()
            message.inputs.add(name=name, datatype="BYTES", shape=[1])
            message.raw_input_contents.append(struct.pack("<I", len(raw)) + raw)
        for name in self.flags:
            message.inputs.add(name=name, datatype="BOOL", shape=[1])
            message.raw_input_contents.append(b"\x01")
        if self.priority:
            message.parameters["priority"].uint64_param = self.priority
        if self.timeout_us is not None:
            message.parameters["timeout"].int64_param = self.timeout_us
        if self.slo_class is not None:
            message.parameters["slo_class"].string_param = self.slo_class
        if "stream" in self.flags:
            message.parameters["lean_chunks"].bool_param = True  # what does not change, not with every chunk
        for name, text in self.settings:
            message.parameters[name].string_param = text
        return message


def build_request(
    prompt: str,
    *,
    model: str,
    sampling: SamplingParams | None,
    stream: bool,
    priority: int,
    timeout_s: float | None,
    request_id: str | None,
    slo_class: str | None,
    details: bool,
) -> Request:
    """Checks what this side can check. Raises :class:`InvalidRequest` with one sentence."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the prompt is not valid Unicode: it holds half of a surrogate pair") from None
    if priority < 0:
        raise InvalidRequest(f"priority must be 0 (the default) or more, not {priority}: 1 is the highest")
    if timeout_s is not None and not (math.isfinite(timeout_s) and timeout_s > 0):
        raise InvalidRequest(f"timeout_s must be a positive number of seconds, not {timeout_s}")
    sampling = sampling or SamplingParams()
    sampling_json = sampling.to_json()
    # Without this flag a response in one piece begins with the prompt.
    scores = _SCORES if sampling.logprobs is not None else ()
    prompt_scores = _PROMPT_SCORES if sampling.prompt_logprobs is not None else ()
    flags = ("exclude_input_in_output", *_ALWAYS_ASKED, *scores, *prompt_scores)
    return Request(
        model=model,
        request_id=request_id or uuid.uuid4().hex,
        texts=(("text_input", prompt), ("sampling_parameters", sampling_json)),
        flags=flags + (("stream",) if stream else ()) + (_DETAILS if details else ()),
        priority=priority,
        timeout_us=None if timeout_s is None else max(1, round(timeout_s * 1e6)),
        slo_class=slo_class,
    )


def mode_request(model: str, mode: str, cap: float | None, admin_key: str) -> Request:
    """Changes the controller's mode, its cap, or both. It goes ahead of everything in the server's queue."""
    settings = {"morph_mode": mode, "morph_cap": "" if cap is None else repr(cap), "morph_admin_key": admin_key}
    return Request(
        model=model, request_id=uuid.uuid4().hex, texts=(("text_input", ""),), flags=(), priority=1, timeout_us=None,
        slo_class=None, settings=tuple((name, text) for name, text in settings.items() if text),
    )  # fmt: skip


def channel_options(own_connection: bool) -> list[tuple[str, int]]:
    """gRPC channel arguments; ``own_connection`` keeps gRPC from sharing one TCP connection among channels."""
    options = [
        ("grpc.max_send_message_length", _LARGEST_MESSAGE),
        ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
    ]
    return [*options, ("grpc.use_local_subchannel_pool", 1)] if own_connection else options


def decode(message: Any, arrival_s: float) -> Chunk | None:
    """One ``ModelInferResponse`` as a chunk; ``None`` for a response without outputs (a bare final flag).

    Raises :class:`ServerError` where the tensors do not follow the contract.
    """
    if not message.outputs:
        return None
    try:
        found = _tensors(message)
        first, *more = _outputs(found)
        return Chunk(
            **vars(first),
            num_input_tokens=_first(found.get("num_input_tokens"), None),
            arrival_s=arrival_s,
            num_cached_tokens=_first(found.get("num_cached_tokens"), None),
            prompt_logprobs=_prompt_logprobs(_first(found.get("prompt_logprobs"), _NULL)),
            more=tuple(more),
        )
    except (KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ServerError(f"the server's response does not follow the wire contract ({error!r})") from None


class ResponseReader:
    """Reads the responses to one request: decodes, times, and notices how the stream ended."""

    def __init__(self) -> None:
        self._sent = time.monotonic()
        self.complete = False
        """Whether the last response has come: what is left of the stream is its end."""

    def read(self, response: Any) -> Chunk | None:
        """One ``ModelInferResponse``; ``None`` if it holds no text (an empty final response)."""
        chunk = decode(response, time.monotonic() - self._sent)
        parameters = response.parameters
        final = "triton_final_response" in parameters and parameters["triton_final_response"].bool_param
        if final or (chunk is not None and all(output.finish_reason for output in chunk.outputs)):
            self.complete = True
        return chunk

    def check_complete(self) -> None:
        """Call at the end of the stream. Raises :class:`ServerError` if the last response never came."""
        if not self.complete:
            raise ServerError("the stream ended before its last response: the text may be cut off")


def _outputs(found: dict[str, Sequence[Any]]) -> list[OutputChunk]:
    """The outputs of a response, from its tensors: one entry each, but for the levels, which stand in a row."""
    texts = found["text_output"]
    nothing = [None] * len(texts)
    levels = tuple(found.get("morph_level", ()))
    counts = [int(count) for count in found.get("num_output_tokens", ())] or [len(levels)]
    reasons = [(reason or b"").decode() for reason in found.get("finish_reason", nothing)]
    outputs, at = [], 0
    for text, count, reason, share, scores in zip(
        texts, counts, reasons, found.get("rung_share", nothing), found.get("logprobs", nothing), strict=True
    ):
        outputs.append(
            OutputChunk(
                text=text.decode(errors="replace"),
                tokens=count,
                levels=levels[at : at + count],
                rung_share=_rung_share(share) if share else None,
                finish_reason=None if reason in ("None", "") else reason,
                logprobs=_logprobs(scores or _NULL),
            )
        )
        at += count
    return outputs


def _tensors(message: Any) -> dict[str, Sequence[Any]]:
    """The values of each output by its name."""
    raws = message.raw_output_contents
    found: dict[str, Sequence[Any]] = {}
    for index, tensor in enumerate(message.outputs):
        if index < len(raws):
            found[tensor.name] = _unpack(tensor.datatype, raws[index])
        else:
            contents = tensor.contents
            by_type = {
                "BYTES": contents.bytes_contents, "UINT32": contents.uint_contents, "INT32": contents.int_contents
            }  # fmt: skip
            found[tensor.name] = list(by_type[tensor.datatype])
    return found


def _unpack(datatype: str, raw: bytes) -> Sequence[Any]:
    if datatype == "BYTES":
        items, at = [], 0
        while at < len(raw):
            (size,) = struct.unpack_from("<I", raw, at)
            if at + 4 + size > len(raw):
                raise ValueError("a string tensor is cut short")
            items.append(raw[at + 4 : at + 4 + size])
            at += 4 + size
        return items
    letter = {"UINT32": "I", "INT32": "i"}[datatype]
    return struct.unpack(f"<{len(raw) // 4}{letter}", raw)


def _first(values: Sequence[Any] | None, default: Any) -> Any:
    return values[0] if values else default


def _logprobs(raw: bytes) -> tuple[tuple[TokenLogprob, ...], ...]:
    return () if raw == _NULL else tuple(_ranked(at) for at in json.loads(raw) or ())


def _prompt_logprobs(raw: bytes) -> tuple[tuple[TokenLogprob, ...] | None, ...]:
    if raw == _NULL:
        return ()
    return tuple(None if at is None else _ranked(at) for at in json.loads(raw) or ())


def _ranked(tokens: dict[str, Any]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(int(token), str(at["decoded_token"]), float(at["logprob"]), int(at["rank"]))
        for token, at in tokens.items()
    )


def _rung_share(raw: bytes) -> RungShare:
    share = json.loads(raw)
    return RungShare(full=float(share["full"]), w8=float(share["w8"]), w4=float(share["w4"]))
