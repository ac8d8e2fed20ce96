"""Figures as ``<svg>`` elements of a page: in the page's colours, and referring to nothing outside themselves."""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from morph_client.palette import Theme


def themed(draw: Callable[[Theme], Any], prefix: str) -> str:
    """An ``<svg>`` element whose colours are the CSS variables ``--background``, ``--text`` and so on.

    Args:
        draw: makes the matplotlib figure in given colours.
        prefix: begins every id of the element; unique in its page.
    """
    stand_ins = {item.name: f"#0{i:x}fe{i:x}0" for i, item in enumerate(fields(Theme), 1)}
    figure = draw(Theme(**stand_ins))
    # Embeds letters as outlines: they look the same wherever the page is opened.
    with importlib.import_module("matplotlib").rc_context({"svg.fonttype": "path", "svg.hashsalt": "morph"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor=figure.get_facecolor())
    svg = buffer.getvalue()
    for name, colour in stand_ins.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'\bid="', f'id="{prefix}', _self_contained(svg))
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)


def _self_contained(svg: str) -> str:
    """Leaves out what an HTML page does not need: the XML head, namespaces, and the metadata with its addresses."""
    svg = svg[svg.index("<svg") :]
    start, end = svg.find("<metadata>"), svg.find("</metadata>")
    if start >= 0:
        svg = svg[:start] + svg[end + len("</metadata>") :]
    head_end = svg.index(">")
    view_box = svg[svg.index('viewBox="') : head_end].split('"')[1]
    return f'<svg viewBox="{view_box}" role="img">{svg[head_end + 1 :]}'.replace("xlink:href=", "href=")
