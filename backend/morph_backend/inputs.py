"""What a request asks for, read off Triton's tensors and parameters into plain Python values.

Input tensors live in shared memory until the request object is dropped; nothing here keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from morph_backend.run_control import CONTROL_PARAMETERS, RunControl, read_control
from morph_runtime.engine.messages import SamplingParams
from morph_runtime.errors import RequestError
from morph_runtime.text.parameters import ParameterLimits, parse_sampling_parameters, stop_strings, within_context
from morph_runtime.text.tokenizer import decode_utf8

LEAN = "lean_chunks"
RESERVED_PARAMETERS = CONTROL_PARAMETERS | {
    "id", "priority", "timeout", "headers", "slo_class", "binary_data_output", LEAN,
}  # fmt: skip
RESERVED_PREFIXES = ("sequence_", "triton_")
MAX_SLO_CLASS_CHARS = 64
STREAM_ECHO_ERROR = "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed."


@dataclass(frozen=True)
class Wants:
    """Which outputs besides the text were asked for."""

    finish_reason: bool = False
    cumulative_logprob: bool = False
    logprobs: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    morph_level: bool = False
    rung_share: bool = False
    num_cached_tokens: bool = False
    prompt_logprobs: bool = False
    recomputed_at: bool = False
    level_history: bool = False


@dataclass(frozen=True)
class GenerateRequest:
    """One request, read and checked.

    Attributes:
        echo: the prompt stands before the output text.
        control: what the administrator wants changed; nothing is generated then.
        lean_chunks: `finish_reason`, `num_input_tokens` and `num_cached_tokens` come with the first response and from
            the one on in which an output has ended, not with those between.
    """

    text: str
    stream: bool
    echo: bool
    sampling: SamplingParams
    wants: Wants
    slo_class: str
    control: RunControl | None = None
    lean_chunks: bool = False

    def within_context(self, prompt_tokens: int, max_model_len: int) -> GenerateRequest:
        """The same request with a number of tokens to generate, where it asks for as many as there is room for."""
        return replace(self, sampling=within_context(self.sampling, prompt_tokens, max_model_len))


class InputError(RequestError):
    """A request error whose text is given as it is (where clients know vLLM's exact sentence)."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.args = (message,)


def read_request(request: Any, limits: ParameterLimits) -> GenerateRequest:
    """Read a Triton request.

    Raises:
        RequestError: an input has the wrong type, shape or value; the text names it.
    """
    arrays = {tensor.name(): _array(tensor) for tensor in request.inputs()}
    parameters = _request_parameters(request)
    text = _text(arrays, "text_input")
    if text is None:
        raise RequestError("text_input", "the prompt is missing.")
    stream = _flag(arrays, "stream", False)
    exclude = _flag(arrays, "exclude_input_in_output", stream)
    if stream and not exclude:
        raise InputError("exclude_input_in_output", STREAM_ECHO_ERROR)
    _refuse_unsupported(arrays)
    sampling = _sampling(arrays, parameters, limits)
    wants = Wants(**{name: _flag(arrays, f"return_{name}", False) for name in Wants.__dataclass_fields__})
    if wants.cumulative_logprob:
        sampling = msgspec.structs.replace(sampling, score=True)
    if wants.level_history:
        sampling = msgspec.structs.replace(sampling, history=True)
    return GenerateRequest(
        text=text,
        stream=stream,
        echo=not exclude,
        sampling=sampling,
        wants=wants,
        slo_class=_slo_class(parameters),
        control=read_control(parameters),
        lean_chunks=_lean_chunks(parameters),
    )


def _array(tensor: Any) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = tensor.as_numpy()
    except Exception as error:
        raise RequestError(tensor.name(), f"the tensor cannot be read: {error}.") from error
    return array


def _sampling(
    arrays: Mapping[str, np.ndarray[Any, Any]], parameters: Mapping[str, Any], limits: ParameterLimits
) -> SamplingParams:
    given = _text(arrays, "sampling_parameters")
    if given is None:
        own = {k: v for k, v in parameters.items() if not _is_reserved(k)}
        sampling = parse_sampling_parameters(own, limits)
    else:
        sampling = parse_sampling_parameters(given, limits)
    stops = arrays.get("stop")
    if stops is None:
        return sampling
    if stops.dtype != np.object_ or stops.ndim != 1:
        raise RequestError("stop", "must be a list of strings.")
    return replace_stop(sampling, [decode_utf8(_bytes("stop", item), "stop") for item in stops.tolist()], limits)


def replace_stop(sampling: SamplingParams, stops: list[str], limits: ParameterLimits) -> SamplingParams:
    """The same parameters with other stop strings. Raises RequestError as `stop_strings` does."""
    return msgspec.structs.replace(sampling, stop=stop_strings(stops, limits))


def _refuse_unsupported(arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    images = arrays.get("image")
    if images is not None and images.size:
        raise RequestError("image", "images are not supported: the model takes text alone.")
    embedding = arrays.get("embedding_request")
    if embedding is not None and embedding.size and embedding.reshape(-1)[0]:
        raise RequestError("embedding_request", "embeddings are not supported: the model generates text.")


def _request_parameters(request: Any) -> Mapping[str, Any]:
    text = request.parameters()
    if not text:
        return {}
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RequestError("parameters", f"the request's parameters cannot be read: {error}.") from None
    return values if isinstance(values, dict) else {}


def _is_reserved(key: str) -> bool:
    return key in RESERVED_PARAMETERS or key.startswith(RESERVED_PREFIXES)


def _slo_class(parameters: Mapping[str, Any]) -> str:
    value = parameters.get("slo_class", "")
    if not isinstance(value, str) or len(value) > MAX_SLO_CLASS_CHARS or not (value.isascii() and value.isprintable()):
        raise RequestError("slo_class", f"must be a name of at most {MAX_SLO_CLASS_CHARS} printable ASCII characters.")
    return value


def _lean_chunks(parameters: Mapping[str, Any]) -> bool:
    value = parameters.get(LEAN, False)
    if not isinstance(value, bool):
        raise RequestError(LEAN, "must be true or false.")
    return value


def _one(arrays: Mapping[str, np.ndarray[Any, Any]], name: str) -> Any:
    array = arrays.get(name)
    if array is None:
        return None
    if array.shape != (1,):
        raise RequestError(name, f"must have the shape [1], but has {list(array.shape)}.")
    return array[0]


def _flag(arrays: Mapping[str, np.ndarray[Any, Any]], name: str, default: bool) -> bool:
    value = _one(arrays, name)
    if value is None:
        return default
    if not isinstance(value, np.bool_):
        raise RequestError(name, "must be of type BOOL.")
    return bool(value)


def _text(arrays: Mapping[str, np.ndarray[Any, Any]], name: str) -> str | None:
    value = _one(arrays, name)
    return None if value is None else decode_utf8(_bytes(name, value), name)


def _bytes(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if not isinstance(value, bytes):
        raise RequestError(name, "must be of type BYTES.")
    return value
