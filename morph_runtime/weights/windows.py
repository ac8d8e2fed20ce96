"""Which layers see the last tokens only, out of a config.json."""

from __future__ import annotations

from morph_runtime.errors import ConfigError
from morph_runtime.weights.families import Family
from morph_runtime.weights.jsonfile import Fields

SLIDING, FULL = "sliding_attention", "full_attention"


def read_windows(config: Fields, family: Family, layers: int, where: str) -> tuple[int, ...]:
    """Tokens that each layer's queries see, their own included, by layer; 0 for all of them.

    Mistral gives `sliding_window` for all layers; Qwen gives a switch, and either `layer_types` or the number of
    layers that keep full attention. Null is no window; without the field it is the family's own, as in transformers.

    Raises:
        ConfigError: a bad field, named; `where` names the file.
    """
    if not family.window or (config.has("sliding_window") and config.get("sliding_window") is None):
        return (0,) * layers
    if family.window_switch and not config.flag(family.window_switch, False):
        return (0,) * layers
    window = config.whole("sliding_window", family.window)
    if not family.window_switch:
        return (window,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.whole("max_window_layers", 28, low=0)
        kinds = [SLIDING if layer >= first else FULL for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise ConfigError(f"{where}: 'layer_types' must hold '{SLIDING}' or '{FULL}' for each of the {layers} layers.")
    return tuple(window if kind == SLIDING else 0 for kind in kinds)
