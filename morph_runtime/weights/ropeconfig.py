"""The rotary embedding out of a config.json, in transformers 4 and 5 spelling."""

from __future__ import annotations

import math

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rope import RopeSpec
from morph_runtime.weights.jsonfile import Fields

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def read_rope(config: Fields, max_positions: int, where: str) -> RopeSpec:
    """The rotary embedding; `max_positions` is the model's limit in tokens, `where` names the file.

    transformers 5 writes `rope_parameters` with everything, transformers 4 `rope_theta` and `rope_scaling`. Where
    both are there, `rope_scaling` was added by hand and goes first, as in transformers 5; only the base, which it
    seldom holds, is taken from the other then, where transformers 5 falls back to 10,000.

    Raises:
        ConfigError: a kind that is not served, named, a bad field, or two of them that contradict each other.
    """
    parameters = Fields(config.section("rope_parameters") or {}, f"{where}, rope_parameters")
    scaling = config.section("rope_scaling")
    name = "rope_scaling" if scaling else "rope_parameters"
    values = Fields(scaling, f"{where}, rope_scaling") if scaling else parameters
    theta = _theta(config, parameters, values, where)
    for fields in (config, parameters, values):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"{where}: a partial rotary embedding ('partial_rotary_factor' below 1) is not served.")
    kind = values.get("rope_type") or values.get("type")
    if kind is None and scaling and config.section("rope_parameters"):
        raise ConfigError(f"{where}: 'rope_scaling' goes before 'rope_parameters', but names no 'rope_type': name one.")
    kind = kind or "default"
    if kind not in ROPE_KINDS:
        raise ConfigError(
            f"{where}: the rotary embedding '{kind}' in '{name}' is not served; known are: {', '.join(ROPE_KINDS)}."
        )
    if kind == "default":
        return RopeSpec("default", theta)
    factor = values.number("factor")
    if kind == "dynamic":
        # Up to `max_position_embeddings`, which is the limit here, dynamic NTK is the default rotation. Beyond, the
        # base would follow a request's length, and keys in the cache would have been rotated by another one.
        return RopeSpec("default", theta)
    if kind == "linear":
        return RopeSpec("linear", theta, factor)
    original = values.whole(
        "original_max_position_embeddings", config.whole("original_max_position_embeddings", max_positions)
    )
    if kind == "llama3":
        low, high = values.number("low_freq_factor"), values.number("high_freq_factor")
        if high <= low:
            raise ConfigError(
                f"{where}, {name}: 'high_freq_factor' ({high:g}) must be above 'low_freq_factor' ({low:g})."
            )
        return RopeSpec("llama3", theta, factor, original, low, high)
    return RopeSpec(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=values.number("beta_fast", 32.0),
        beta_slow=values.number("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(values, factor),
        truncate=values.flag("truncate", True),
    )


def _theta(config: Fields, parameters: Fields, values: Fields, where: str) -> float:
    """Base of the frequencies; `values` are `parameters`, or a `rope_scaling` that goes before them."""
    if values.get("rope_theta") is not None:
        return values.number("rope_theta")
    outer = config.number("rope_theta", 10000.0)
    inner = parameters.number("rope_theta", outer)
    if config.get("rope_theta") is not None and inner != outer:
        raise ConfigError(
            f"{where}: 'rope_theta' is {outer:g}, but {inner:g} in 'rope_parameters': write the right one into "
            "'rope_scaling'."
        )
    return inner


def _yarn_attention_factor(values: Fields, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if values.get("attention_factor") is not None:
        return values.number("attention_factor")
    if values.get("mscale") and values.get("mscale_all_dim"):
        return scale(values.number("mscale")) / scale(values.number("mscale_all_dim"))
    return scale(1.0)
