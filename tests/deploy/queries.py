"""PromQL, as far as the tests look into it: which series a query asks for, and by which labels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser
import yaml

from triton_server import ROOT

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "morphserve.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
# Put on every series by whoever scrapes.
SCRAPER_LABELS = {"instance", "job", "namespace", "pod", "container", "endpoint"}


@dataclass(frozen=True)
class Query:
    """One query: where it stands, and what a user's choices make of it."""

    place: str
    text: str


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def dashboard_queries() -> list[Query]:
    """All of the dashboard, with Grafana's variables at "all"."""
    found = []
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", "10s")
            found.append(Query(panel["title"], text.replace("$model", ".*").replace("$instance", ".*")))
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def selectors(text: str) -> Iterator[tuple[str, set[str]]]:
    """Each series that a query asks for: its name, and the labels by which it is chosen."""
    yield from _selectors(promql_parser.parse(text))


def _selectors(node: Any) -> Iterator[tuple[str, set[str]]]:
    if isinstance(node, promql_parser.MatrixSelector):
        yield from _selectors(node.vector_selector)
        return
    if isinstance(node, promql_parser.VectorSelector):
        labels = {matcher.name for matcher in node.matchers.matchers}
        yield str(node.name), labels - {"__name__"}
        return
    for name in ("expr", "lhs", "rhs", "param"):
        if (child := getattr(node, name, None)) is not None and not isinstance(child, str):
            yield from _selectors(child)
    args = getattr(node, "args", None)
    for child in args if isinstance(args, (list, tuple)) else ():
        yield from _selectors(child)


def grouping(text: str) -> set[str]:
    """The labels that a query groups or joins by."""
    found = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", text)
    return {label.strip() for labels in found for label in labels.split(",") if label.strip()}


def exported(page: str) -> dict[str, set[str]]:
    """The series of a metrics page: name to labels."""
    series: dict[str, set[str]] = {}
    for line in page.splitlines():
        head = re.match(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ", line)
        if head and not line.startswith("#"):
            series.setdefault(head[1], set()).update(re.findall(r'([a-zA-Z_]\w*)="', head[2] or ""))
    return series
