"""Draw what a terminal shows as a picture for the docs.

    tmux capture-pane -e -p -t SESSION | python tools/terminal_picture.py --out docs/images/top.png --theme dark

Needs Pillow and Matplotlib's fonts (the extra `plots`), and rich.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from rich.ansi import AnsiDecoder
from rich.cells import cell_len
from rich.color import ColorTriplet
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

SIZE = 15
"""Pixels of the font."""
MARGIN = 12


@dataclass(frozen=True)
class Look:
    """Colours of a terminal: background, text, and the eight named ones."""

    theme: TerminalTheme


_NAMED_DARK = [(20, 24, 29), (224, 108, 96), (110, 180, 110), (217, 164, 65), (90, 150, 210), (180, 120, 190),
               (80, 180, 185), (205, 211, 217)]  # fmt: skip
_NAMED_LIGHT = [(31, 41, 51), (190, 60, 50), (40, 120, 50), (150, 100, 10), (30, 90, 160), (130, 60, 140),
                (10, 110, 120), (120, 130, 140)]  # fmt: skip
LOOKS = {
    "dark": Look(TerminalTheme((20, 24, 29), (230, 234, 238), _NAMED_DARK)),
    "light": Look(TerminalTheme((255, 255, 255), (31, 41, 51), _NAMED_LIGHT)),
}


def draw(screen: str, look: Look) -> Image.Image:
    """The screen's text, with its ANSI colours, cell by cell."""
    # One decoder for all lines: a style goes on where a line was wrapped.
    lines = list(AnsiDecoder().decode(screen.rstrip("\n")))
    while lines and not lines[-1].plain.strip():
        lines.pop()
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    plain = ImageFont.truetype(str(fonts / "DejaVuSansMono.ttf"), SIZE)
    bold = ImageFont.truetype(str(fonts / "DejaVuSansMono-Bold.ttf"), SIZE)
    width, height = round(plain.getlength("M")), SIZE + 4
    columns = max(cell_len(line.plain) for line in lines)
    background = look.theme.background_color
    picture = Image.new("RGB", (columns * width + 2 * MARGIN, len(lines) * height + 2 * MARGIN), background)
    brush = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        column = 0
        for letter, style in _letters(line):
            place = (MARGIN + column * width, MARGIN + row * height)
            brush.text(place, letter, fill=_ink(style, look), font=bold if style.bold else plain)
            column += cell_len(letter)
    return picture.quantize(255)


def _letters(line: Text) -> list[tuple[str, Style]]:
    console = Console(color_system="truecolor", force_terminal=True, width=1000)
    return [(letter, segment.style or Style()) for segment in line.render(console) for letter in segment.text]


def _ink(style: Style, look: Look) -> ColorTriplet:
    theme = look.theme
    ink = theme.foreground_color if style.color is None else style.color.get_truecolor(theme)
    if not style.dim:
        return ink
    return ColorTriplet(*(round(0.6 * a + 0.4 * b) for a, b in zip(ink, theme.background_color, strict=True)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw what a terminal shows.")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    parser.add_argument("--theme", choices=sorted(LOOKS), default="dark")
    given = parser.parse_args()
    draw(sys.stdin.read(), LOOKS[given.theme]).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
