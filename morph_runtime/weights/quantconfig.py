"""What a config.json says about quantization, and what to do about methods that are not served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import GROUP, RUNG_BITS
from morph_runtime.weights.jsonfile import Fields

MAKE_ONE = "make one from the unquantized model with `morph quantize`"


def refuse_quantized(section: Mapping[str, Any] | None, path: Path) -> None:
    """A checkpoint that is served as the full precision must not be quantized; `path` is its config.json.

    Raises:
        ConfigError: it is; the text names the method and what to do.
    """
    if section is None:
        return
    method = _method(section)
    remedy = "give the unquantized checkpoint (bfloat16, float16 or float32), the lower precisions are made from it."
    if method == "awq":
        remedy = (
            "set model.path (MORPH_MODEL) to the unquantized model and model.awq_path (MORPH_AWQ) to this folder, "
            "and its W4 rung comes from here."
        )
    raise ConfigError(f"{path}: this checkpoint is quantized already ({method}); {remedy}")


def require_awq(section: Mapping[str, Any] | None, path: Path) -> None:
    """A checkpoint for the W4 rung must be AWQ in AutoAWQ's GEMM layout, 4 bits in groups of 128.

    Raises:
        ConfigError: it is not; the text names what it is and what to do. `path` is its config.json.
    """
    if section is None:
        raise ConfigError(f"{path}: model.awq_path must name an AWQ checkpoint, but this one is not quantized.")
    method = _method(section)
    if method != "awq":
        raise ConfigError(f"{path}: the quantization method '{method}' is not read, only 'awq' is: {MAKE_ONE}.")
    config = Fields(section, f"{path}, quantization_config")
    layout = config.get("version") or config.get("format") or "gemm"
    if not isinstance(layout, str) or layout.lower() != "gemm":
        raise ConfigError(f"{path}: the AWQ layout {layout!r} is not read, only 'gemm' is: {MAKE_ONE}.")
    bits = config.whole("bits", config.whole("w_bit", RUNG_BITS["w4"]))
    if bits != RUNG_BITS["w4"]:
        raise ConfigError(f"{path}: AWQ with {bits} bits is not read, only with {RUNG_BITS['w4']}: {MAKE_ONE}.")
    group = config.whole("group_size", config.whole("q_group_size", GROUP, low=-1), low=-1)
    if group != GROUP:
        raise ConfigError(f"{path}: AWQ in groups of {group} is not read, only in groups of {GROUP}: {MAKE_ONE}.")
    if not config.flag("zero_point", True):
        raise ConfigError(f"{path}: AWQ without zero points is not read: {MAKE_ONE}.")
    if config.get("modules_to_not_convert"):
        raise ConfigError(
            f"{path}: 'modules_to_not_convert' leaves {config.get('modules_to_not_convert')} unquantized, which the "
            f"W4 rung cannot hold: {MAKE_ONE}."
        )


def _method(section: Mapping[str, Any]) -> str:
    """The method's name as it is generally known, lower case."""
    name = section.get("quant_method")
    if name is None and (section.get("load_in_4bit") or section.get("load_in_8bit")):
        return "bitsandbytes"
    return str(name).lower() if isinstance(name, str) else "unknown"
