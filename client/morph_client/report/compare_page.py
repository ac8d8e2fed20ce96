"""What is left after a comparison: table, picture and page, all from its plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morph_client.decision_log import Change, lines
from morph_client.report import compare_plot, compare_table, decisions, files, html
from morph_client.report.html import Log

_NOTES = (
    "Every run has a server of its own, started with the same memory budget; the runs of a repeat follow each other, "
    "and each repeat begins with another configuration. Values are medians over the repeats. Open loop: each request "
    "is sent when it is due. TTFT: from the moment a request was due to its first token. TPOT: mean time per output "
    "token after the first. ITL: pauses between responses that carry tokens. The burst (shaded) is the time in which "
    "requests waited at full precision.",
    "Goodput: complete answers within all targets. Tokens at full precision: computed with every layer at full "
    "precision; layer-weighted: a token counts with the share of its layers at full precision. Live KV: of the "
    "capacity at level 0. Client behind: how late it sent a request.",
    "Perplexity of outputs: of each configuration's own, scored by the model at full precision; the change against "
    "full precision is over pairs of outputs to the same prompt, ± its standard error. Quality loss by levels: by what "
    "'morph quality' found for the levels of the tokens. Common beginning: of characters, before the first difference. "
    "The paper's figures are of other models, GPUs and traces (MorphServe, arXiv 2506.02006, default mode over "
    "full precision).",
)


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws ``report.png`` and ``report.html``. Raises :class:`MissingDependency`, :class:`BadInput`."""
    title, said = f"Comparison on {result['trace']}", compare_table.headline(result)
    image, page = folder / "report.png", folder / "report.html"
    compare_plot.write_png(result, title, image)
    notes = [f"{result['described']} Model: {result['model']}. {result['machine']}.", *_NOTES]
    whole = html.Page(
        title=title,
        verdict=said,
        heads=[column["label"] for column in result["configurations"]],
        rows=compare_table.rows(result),
        svgs=[compare_plot.themed_svgs(result)],
        logs=_logs(result),
        command=result["command"],
        notes=notes,
    )
    files.write_text(page, html.render(whole))
    return [image, page]


def _logs(result: Mapping[str, Any]) -> list[Log]:
    """The decisions of each configuration that morphs, in its middle run."""
    logs = []
    for column in result["configurations"]:
        if column["morphs"]:
            changes = [Change(**change) for change in compare_plot.middle_run(column)["changes"]]
            logs.append(decisions.log_of(column["label"], lines(changes)))
    return logs
