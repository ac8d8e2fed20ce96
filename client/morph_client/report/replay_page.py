"""The picture and the page of one replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from morph_client.replay_plan import ReplayPlan, describe
from morph_client.report import decisions, files, html, plot, table
from morph_client.report.data import Run

NOTES = (
    "Open loop: each request is sent when it is due, whatever has become of the ones before. TTFT: from the moment a "
    "request was due to its first token. TPOT: mean time per output token after the first. ITL: pauses between "
    "responses that carry tokens, of all requests together. Goodput: complete answers within all targets, per second. "
    "Level: number of quantized layers. Every output has the length that the trace gives it.",
)


def headline(run: Run, plan: ReplayPlan) -> str:
    """What the run says, in one or two sentences."""
    s = run.summary
    if s.ttft_s.p95 is None:
        return f"None of {s.requests} requests was answered completely."
    said = f"Half of the {s.requests - s.errors} answers began within {table.seconds(s.ttft_s.p50)}, 95 % within "
    said += f"{table.seconds(s.ttft_s.p95)}; {table.percent(s.level0_share)} of the tokens came at full precision."
    if s.slo_violations is not None:
        target = "" if plan.targets.ttft_s is None else f" of {plan.targets.ttft_s:g} s to the first token"
        said += f" {s.slo_violations} of {s.requests} requests missed the target{target}."
    elif s.errors:
        said += f" {s.errors} requests failed."
    return said


def write(plan: ReplayPlan, run: Run, rows: Sequence[table.Row], command: str, out: Path) -> list[Path]:
    """Draws ``out`` with the endings ``.png`` and ``.html``. Raises :class:`MissingDependency`, :class:`BadInput`."""
    plot.require_matplotlib()
    panels = ("load", "ttft", "queue", "level", "kv", "precision") if run.states else ("load", "ttft", "precision")
    title, said = f"Replay of {plan.trace.source}, {run.label}", headline(run, plan)
    picture = plot.Picture(title, f"{describe(plan)} {said}", [run], (), panels)
    image, page = out.with_suffix(".png"), out.with_suffix(".html")
    plot.write_png(picture, image)
    svgs = [plot.themed_svgs(replace(picture, title="", subtitle=""))]
    logs = [decisions.section(run, from_metrics=True)] if run.states else []
    notes = [describe(plan), *NOTES]
    files.write_text(page, html.render(html.Page(title, said, [run.label], rows, svgs, logs, command, notes)))
    return [image, page]
