"""What is compared: configurations of the server, by its own settings alone."""

from __future__ import annotations

from dataclasses import dataclass

from morph_client.errors import BadInput

BASELINE = "full"
_STATIC = {"full": "full precision", "w8": "static W8", "w4": "static W4"}
_MODES = ("accuracy", "balanced", "performance")
_RUNGS = ("w8", "w4")


@dataclass(frozen=True)
class Configuration:
    """One column of the comparison."""

    name: str
    label: str
    morphs: bool
    environment: dict[str, str]
    """Variables of the server that differ from the user's."""

    @property
    def ladder(self) -> str:
        """Its rungs below full precision."""
        return self.environment["MORPH_LADDER"]

    @property
    def mode(self) -> str:
        """The controller's mode."""
        return self.environment["MORPH_MODE"]


def parse(names: str, ladder: str) -> list[Configuration]:
    """Configurations from ``full,w8,w4,balanced``; a mode may have a ladder of its own, as ``balanced:w8+w4``.

    ``ladder`` is that of the modes without one. Raises :class:`BadInput`.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if BASELINE not in wanted:
        raise BadInput("a comparison needs 'full' among its configurations: ratios are over full precision")
    if len(set(wanted)) != len(wanted):
        raise BadInput(f"each configuration may be named once: {names}")
    return [_one(name, ladder) for name in wanted]


def _one(name: str, ladder: str) -> Configuration:
    if name in _STATIC:
        own = {"MORPH_LADDER": ladder if name == BASELINE else name, "MORPH_PIN": name, "MORPH_MODE": "off"}
        # An AWQ checkpoint has no use at W8, and the server says so.
        return Configuration(name, _STATIC[name], False, {**own, "MORPH_AWQ": ""} if name == "w8" else own)
    mode, _, rungs = name.partition(":")
    rungs = rungs.replace("+", ",") or ladder
    if mode not in _MODES:
        known = ", ".join([*_STATIC, *_MODES])
        raise BadInput(f"there is no configuration '{name}': known are {known}; a ladder may follow, as balanced:w8+w4")
    steps = rungs.split(",")
    if not set(steps) <= set(_RUNGS) or steps != [r for r in _RUNGS if r in steps]:
        raise BadInput(f"'{rungs}' is no ladder: it must be w8, w4 or w8,w4")
    label = f"morphing, {mode}" + (f" ({'→'.join(s.upper() for s in steps)})" if ":" in name else "")
    return Configuration(name, label, True, {"MORPH_LADDER": rungs, "MORPH_PIN": "", "MORPH_MODE": mode})


def interleaved(configurations: list[Configuration], repeats: int) -> list[tuple[int, Configuration]]:
    """The order of the runs: each repeat has every configuration once, each time beginning with another one.

    So a machine that slows down or speeds up over time favours none. Raises :class:`BadInput` for no repeat.
    """
    if repeats < 1:
        raise BadInput(f"there must be at least 1 repeat, not {repeats}")
    count = len(configurations)
    return [(r, configurations[(r + i) % count]) for r in range(repeats) for i in range(count)]
