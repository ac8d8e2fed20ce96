"""The rotary embedding out of a config.json, in transformers 4 and 5 spelling."""

from __future__ import annotations

import math

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rope import RopeSpec
from morph_runtime.weights.jsonfile import Fields

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def read_rope(config: Fields, max_positions: int, where: str) -> RopeSpec:
    """The rotary embedding; `max_positions` is the model's limit in tokens, `where` names the file.

    transformers 5 writes `rope_parameters` with everything, transformers 4 `rope_theta` and `rope_scaling`.

    Raises:
        ConfigError: a kind that is not served, named, or a bad field.
    """
    section = config.section("rope_parameters")
    name = "rope_parameters" if section is not None else "rope_scaling"
    if section is None:
        section = config.section("rope_scaling")
    values = Fields(section or {}, f"{where}, {name}")
    theta = values.number("rope_theta", config.number("rope_theta", 10000.0))
    for fields in (config, values):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"{where}: a partial rotary embedding ('partial_rotary_factor' below 1) is not served.")
    kind = values.get("rope_type") or values.get("type") or "default"
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


def _yarn_attention_factor(values: Fields, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if values.get("attention_factor") is not None:
        return values.number("attention_factor")
    if values.get("mscale") and values.get("mscale_all_dim"):
        return scale(values.number("mscale")) / scale(values.number("mscale_all_dim"))
    return scale(1.0)
