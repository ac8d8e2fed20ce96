"""Service classes: what a request may expect of its latency, by the name that it gives (`slo_class`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from morph_runtime.errors import ConfigError, RequestError

LONGEST_S = 3600.0


@dataclass(frozen=True)
class SloClass:
    """The targets of one class. `ttft_s`: seconds to the first token; `tpot_s`: seconds per token after it, or None."""

    name: str
    ttft_s: float
    tpot_s: float | None = None


def parse_classes(texts: Sequence[str], ttft_s: float, tpot_s: float) -> tuple[SloClass, ...]:
    """The classes of the settings. The first one, without a name, is that of requests that name none.

    Args:
        texts: each `name=ttft` or `name=ttft/tpot`, seconds.
        ttft_s: target of requests without a class.
        tpot_s: the same; 0 for none.

    Raises:
        ConfigError: one of them is not of that form; the text shows it.
    """
    classes = [SloClass("", ttft_s, tpot_s or None)]
    for text in texts:
        name, equals, targets = text.strip().partition("=")
        first, slash, each = targets.partition("/")
        ttft, tpot = _seconds(first), _seconds(each) if slash else None
        if not (equals and name.strip() and ttft and (tpot or not slash)):
            raise ConfigError(
                "morph.slo_classes must be entries like interactive=2/0.1 or batch=30 (a name, seconds to the first "
                f"token, and perhaps seconds per further token), but has {text!r}."
            )
        if name.strip() in [known.name for known in classes]:
            raise ConfigError(f"morph.slo_classes names the class '{name.strip()}' twice.")
        classes.append(SloClass(name.strip(), ttft, tpot))
    return tuple(classes)


def class_index(classes: Sequence[SloClass], name: str) -> int:
    """The place of a class; 0 for one that is not known."""
    return next((at for at, known in enumerate(classes) if known.name == name), 0)


def check_class(classes: Sequence[SloClass], name: str) -> None:
    """Refuse a request's class that the settings do not name. Where they name none, any name is let pass.

    Raises:
        RequestError: with the known names.
    """
    known = [entry.name for entry in classes]
    if name not in known and len(known) > 1:
        raise RequestError("slo_class", f"must be one of {', '.join(known[1:])}, but is '{name}'.")


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 < value <= LONGEST_S else None
