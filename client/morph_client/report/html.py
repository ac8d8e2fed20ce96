"""The page: verdict, picture and table in one file that refers to nothing outside itself."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, fields

from morph_client.palette import Theme, dark, light
from morph_client.report.table import Row

_STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
* { box-sizing: border-box; }
body { background: var(--background); color: var(--text); margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 3rem;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%%; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.125rem; margin: 2rem 0 .5rem; }
.verdict { font-size: 1.125rem; margin: 0 0 1.5rem; max-width: 46rem; }
svg { display: block; width: 100%%; height: auto; margin: 0 0 1.5rem; }
.narrow { display: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 0 .3rem 1.75rem; text-align: right; white-space: nowrap; font-weight: 400; }
th:first-child, td:first-child { padding-left: 0; text-align: left; background: var(--background) padding-box; }
thead th { border-bottom: 1px solid var(--muted); font-weight: 600; white-space: normal; vertical-align: bottom; }
tr.sub th { padding-left: 1rem; }
tr.group td, tr.group th { border-top: 1px solid var(--grid); }
.two thead th:nth-last-child(2) { color: var(--off); } .two thead th:last-child { color: var(--on); }
pre { font: .8125rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 0;
  padding: .75rem 1rem; background: var(--burst); border-radius: .375rem; overflow: auto; max-height: 28rem; }
.note + pre { margin-top: .5rem; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
.note { color: var(--muted); font-size: .9rem; max-width: 46rem; margin: 1rem 0 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { padding: 1.25rem 1rem 2rem; }
  .wide { display: none; } .narrow { display: block; }
  table { font-size: .875rem; }
  th, td { padding-left: 1rem; }
  th:first-child, td:first-child { position: sticky; left: 0; white-space: normal; min-width: 7.5rem; }
}
"""


@dataclass(frozen=True)
class Log:
    """Lines for a person, under a heading and a sentence that says what they are."""

    heading: str
    about: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Page:
    """What a page says, from top to bottom."""

    title: str
    verdict: str
    heads: Sequence[str]
    """Names of the table's columns."""
    rows: Sequence[Row]
    svgs: Sequence[tuple[str, str]] = ()
    """Pictures, each for a screen and for a phone, from :mod:`morph_client.report.svg`."""
    logs: Sequence[Log] = ()
    command: str = ""
    """What was typed."""
    notes: Sequence[str] = ()


def render(page: Page) -> str:
    """The whole HTML file."""
    style = _STYLE % {"light": _variables(light()), "dark": _variables(dark())}
    heads = "".join(f"<th scope='col'>{html.escape(head)}</th>" for head in page.heads)
    lines = "\n".join(_line(row) for row in page.rows)
    pictures = "\n".join(
        f'<div class="wide">{wide}</div>\n<div class="narrow">{narrow}</div>' for wide, narrow in page.svgs
    )
    below = "\n".join(f"<p class='note'>{html.escape(note)}</p>" for note in page.notes)
    command = f'<h2>Command</h2>\n<pre class="command">{html.escape(page.command)}</pre>' if page.command else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(page.title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{html.escape(page.title)}</h1>
<p class="verdict">{html.escape(page.verdict)}</p>
{pictures}
<div class="scroll"><table{" class='two'" if len(page.heads) == 2 else ""}>
<thead><tr><th></th>{heads}</tr></thead>
<tbody>
{lines}
</tbody>
</table></div>
{"".join(map(_log, page.logs))}
{command}
{below}
</body>
</html>
"""


def _log(log: Log) -> str:
    text = html.escape("\n".join(log.lines))
    about = html.escape(log.about)
    return f"<h2>{html.escape(log.heading)}</h2>\n<p class='note'>{about}</p>\n<pre>{text}</pre>\n"


def _line(row: Row) -> str:
    cells = "".join(f"<td>{html.escape(value)}</td>" for value in row.values)
    classes = " ".join(["group"] * row.heads_group + ["sub"] * row.name.startswith(" "))
    group = f" class='{classes}'" if classes else ""
    return f"<tr{group}><th scope='row'>{html.escape(row.name)}</th>{cells}</tr>"


def _variables(theme: Theme) -> str:
    return " ".join(f"--{item.name}: {getattr(theme, item.name)};" for item in fields(theme))
