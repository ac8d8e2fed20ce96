"""The colours, in one place: rungs, runs and the two themes of a picture."""

from __future__ import annotations

from dataclasses import dataclass

RUNGS = ("full", "w8", "w4")
RUNG_OF_BITS = {16: "full", 8: "w8", 4: "w4"}
RUNG_STYLE = {"full": "#4a86c5", "w8": "#b98414", "w4": "#cf6a4c"}
# Told apart without colour too: in a log, on paper, by a colour-blind reader.
RUNG_GLYPH = {"full": "█", "w8": "▓", "w4": "░"}
RUNG_LETTER = {"full": "F", "w8": "8", "w4": "4"}

ACCENT = "#2a9d9f"
FURTHER = ("#9273c4", "#4f9a5f")
"""What comes beside the accent: further configurations that morph."""
MUTED = "#8a94a0"
WARN = "#b98414"
BAD = "#cf6a4c"


@dataclass(frozen=True)
class Theme:
    """The colours of one picture."""

    background: str
    text: str
    muted: str
    grid: str
    burst: str
    load: str
    off: str
    on: str


def light() -> Theme:
    """For paper and bright pages."""
    return Theme("#ffffff", "#1f2933", "#5f6b77", "#e3e7ec", "#f1f4f8", "#aab6c3", "#7d8894", "#0e7f88")


def dark() -> Theme:
    """For dark pages."""
    return Theme("#14181d", "#e6eaee", "#9aa5b1", "#2c353f", "#1e252d", "#566372", "#98a4b1", "#3fbcc4")
