"""The page: verdict, picture and table in one file that refers to nothing outside itself."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import fields

from morph_client.palette import Theme, dark, light
from morph_client.report.data import Run
from morph_client.report.table import Row

_STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
body { background: var(--background); color: var(--text); margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 3rem;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
.verdict { font-size: 1.125rem; margin: 0 0 1.5rem; }
svg { display: block; width: 100%%; height: auto; margin: 0 0 1.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 0 .3rem 2.5rem; text-align: right; white-space: nowrap; font-weight: 400; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
thead th { border-bottom: 1px solid var(--muted); font-weight: 600; }
tr.group td, tr.group th { border-top: 1px solid var(--grid); }
thead th:nth-last-child(2) { color: var(--off); } thead th:last-child { color: var(--on); }
.note { color: var(--muted); font-size: .9rem; max-width: 46rem; margin: 1.5rem 0 0; }
"""


def page(
    title: str, verdict: str, rows: Sequence[Row], runs: Sequence[Run], svg: str | None, notes: Sequence[str]
) -> str:
    """The whole HTML file. ``svg`` comes from :func:`morph_client.report.plot.themed_svg`, or is ``None``."""
    style = _STYLE % {"light": _variables(light()), "dark": _variables(dark())}
    heads = "".join(f"<th scope='col'>{html.escape(run.label)}</th>" for run in runs)
    lines = "\n".join(_line(row) for row in rows)
    below = "\n".join(f"<p class='note'>{html.escape(note)}</p>" for note in notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p class="verdict">{html.escape(verdict)}</p>
{svg or ""}
<div class="scroll"><table>
<thead><tr><th></th>{heads}</tr></thead>
<tbody>
{lines}
</tbody>
</table></div>
{below}
</body>
</html>
"""


def _line(row: Row) -> str:
    cells = "".join(f"<td>{html.escape(value)}</td>" for value in row.values)
    group = " class='group'" if row.heads_group else ""
    return f"<tr{group}><th scope='row'>{html.escape(row.name)}</th>{cells}</tr>"


def _variables(theme: Theme) -> str:
    return " ".join(f"--{item.name}: {getattr(theme, item.name)};" for item in fields(theme))
