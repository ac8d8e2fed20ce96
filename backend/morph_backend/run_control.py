"""Requests of the administrator: the controller's mode and cap, changed while the model serves.

Such a request is an ordinary one with the parameters `morph_mode` or `morph_cap`, and with the key of the server's
administrator. Nothing is generated for it; its answer is one sentence.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from morph_runtime.config import MODES
from morph_runtime.errors import RequestError

MODE, CAP, KEY = "morph_mode", "morph_cap", "morph_admin_key"
CONTROL_PARAMETERS = frozenset({MODE, CAP, KEY})
KEY_VARIABLE = "MORPH_ADMIN_KEY"


@dataclass(frozen=True)
class RunControl:
    """What is to be changed: the mode (empty: nothing), the cap as a share of the levels (None: nothing)."""

    mode: str
    cap: float | None
    key: str

    def __str__(self) -> str:
        """The answer to it."""
        mode = f"mode {self.mode}" if self.mode else ""
        cap = "" if self.cap is None else f"cap {self.cap:g}"
        return ", ".join(filter(None, (mode, cap))) + "."


def read_control(parameters: Mapping[str, Any]) -> RunControl | None:
    """What a request's parameters ask for; None for a request that is to generate.

    Raises:
        RequestError: a value is not valid; the text names it.
    """
    if not CONTROL_PARAMETERS & parameters.keys():
        return None
    mode, cap, key = parameters.get(MODE, ""), parameters.get(CAP), parameters.get(KEY, "")
    if not isinstance(key, str):
        raise RequestError(KEY, "must be a text.")
    if mode not in (*MODES, ""):
        raise RequestError(MODE, f"must be one of {', '.join(MODES)}, but is {mode!r}.")
    share = None if cap is None else _share(cap)
    if not mode and share is None:
        raise RequestError(KEY, f"is for requests that set {MODE} or {CAP}.")
    return RunControl(mode, share, key)


def check_key(given: str, key: str) -> None:
    """Let nobody but the administrator pass.

    Args:
        given: by the request.
        key: the server's; empty if it has none.

    Raises:
        RequestError: they differ, or there is none.
    """
    if not key:
        raise RequestError(KEY, f"the server has no key: start it with {KEY_VARIABLE} to change this while it runs.")
    if not hmac.compare_digest(given.encode("utf-8", "replace"), key.encode()):
        raise RequestError(KEY, f"must be the server's {KEY_VARIABLE}.")


def _share(value: Any) -> float:
    try:
        share = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        share = math.nan
    if not 0 <= share <= 1:
        raise RequestError(CAP, "must be a number from 0 (full precision alone) to 1 (all levels).")
    return share
