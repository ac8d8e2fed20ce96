"""Write docs/metrics.md: every metric, from the code that exports it, and who looks at it.

    python tools/metrics_reference.py            writes it
    python tools/metrics_reference.py --check    status 1 if it is not up to date

A metric is described where it is declared (`backend/morph_backend/metric_catalog.py`); who uses it is read from
dashboard, alerts and autoscalers in `deploy/`. Needs PyYAML (the extra `dev`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from morph_backend.metric_catalog import HISTOGRAM, MetricSpec, catalog, unit_of

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "metrics.md"
CONTEXT = 2048
"""Tokens; the buckets of token counts end at the model's context, this is the demo model's."""

# What Triton itself exports and our files ask for: kind, unit, meaning.
TRITONS: Mapping[str, tuple[str, str, str]] = {
    "nv_inference_pending_request_count": ("gauge", "requests", "Requests in Triton's queue."),
    "nv_inference_queue_duration_us": ("counter", "microseconds", "Time in Triton's queue, of all that have left it."),
    "nv_inference_request_success": ("counter", "requests", "Requests that ended without an error."),
    "nv_gpu_utilization": ("gauge", "share, 0 to 1", "How busy the GPU is."),
    "nv_gpu_memory_used_bytes": ("gauge", "bytes", "GPU memory in use, by all processes."),
    "nv_gpu_memory_total_bytes": ("gauge", "bytes", "GPU memory that there is."),
    "nv_gpu_power_usage": ("gauge", "watts", "Power that the GPU draws."),
    "nv_cpu_utilization": ("gauge", "share, 0 to 1", "How busy the machine's processors are."),
}

INTRO = """\
<!-- Made by `python tools/metrics_reference.py` from the code; a test fails if it is not up to date. -->
# Metrics

All stand on Triton's own metrics endpoint, port 8002. Scrape every 2 s: 15 s hides morphing.

* Every metric of ours has the labels `model` and `version`; the tables name the others.
* Counters only grow, and begin at 0 when the server starts: use `rate` or `increase`.
* A histogram is three series: `..._bucket` with the label `le`, `..._sum` and `..._count`.
* `REPORT_CUSTOM_METRICS` = `false` in `config.pbtxt`, or `disable_log_stats` in `model.json`, switches ours off.

*Used by* names panels of the dashboard (`deploy/grafana`), **alerts** (`deploy/prometheus/alerts.yml`), the autoscalers
of `deploy/kubernetes`, and `morph top`. What the alerts ask of you: [deploy.md](deploy.md#what-to-watch).
"""

SECTIONS = (
    ("morph_", "Morphing, memory and health", ""),
    (
        "vllm:",
        "Requests, tokens and latency",
        "Names and buckets are those of Triton's vLLM backend, the gauges those of vLLM's server; so are the buckets "
        "of the time to first token above 10 s.",
    ),
    (
        "nv_trt_llm_",
        "For load balancers",
        "Named as by Triton's TensorRT-LLM backend; Triton's ORCA headers and Kubernetes' Gateway API read them.",
    ),
)
NUDGES = """\
A nudge is an expired request that the model sends to itself: Triton's batcher otherwise looks only every 500 ms whether
the model has become free. It is sent while requests are queued, never reaches the model, and Triton books it under
`reason="REJECTED"`, so subtract `morph_queue_nudges_total` before alerting on that count. `QUEUE_NUDGE` = `false` in
`config.pbtxt` switches it off.
"""


def users(root: Path = ROOT) -> dict[str, list[str]]:
    """Who asks for what: the names in each query, rule and program, and the places in a fixed order."""
    found: dict[str, list[str]] = {}
    for place, text in _texts(root):
        for word in dict.fromkeys(re.findall(r"[a-z][\w:]+", text)):
            places = found.setdefault(re.sub("_(bucket|sum|count)$", "", word) if word not in TRITONS else word, [])
            if place not in places:
                places.append(place)
    return found


def _texts(root: Path) -> Iterator[tuple[str, str]]:
    deploy = root / "deploy"
    dashboard = json.loads((deploy / "grafana" / "dashboards" / "morphserve.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    groups = yaml.safe_load((deploy / "prometheus" / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    recorded = {rule["record"]: rule["expr"] for rule in rules if "record" in rule}
    for rule in rules:
        if "alert" in rule:  # with what the recorded series in it are made of
            through = [text for name, text in recorded.items() if name in rule["expr"]]
            yield f"**{rule['alert']}**", " ".join([rule["expr"], *through])
    scalers = sorted((deploy / "kubernetes" / "overlays").glob("*/*.yaml"))
    for path in scalers:
        text = path.read_text()
        if path.name in ("hpa.yaml", "scaledobject.yaml"):
            through = [expression for name, expression in recorded.items() if name in text]
            yield "HPA" if path.name == "hpa.yaml" else "KEDA", " ".join([text, *through])
    yield "`morph top`", (root / "client" / "morph_client" / "state.py").read_text()


def render(metrics: Mapping[str, MetricSpec], used: Mapping[str, list[str]]) -> str:
    """The document. Raises ValueError for a metric of Triton's that is asked for and not described here."""
    unknown = sorted(name for name in used if name.startswith("nv_") and name not in TRITONS and name not in metrics)
    if unknown:
        raise ValueError(f"describe {', '.join(unknown)} in TRITONS of tools/metrics_reference.py")
    parts = [INTRO]
    for prefix, title, about in SECTIONS:
        rows = [_row(name, spec, used) for name, spec in metrics.items() if name.startswith(prefix)]
        parts.append(_table(title, about, ("name", "type", "unit", "labels", "meaning", "used by"), rows))
    histograms = [
        f"| `{name}` | {', '.join(f'{bound:g}' for bound in spec.buckets)} |"
        for name, spec in metrics.items()
        if spec.kind == HISTOGRAM
    ]
    about = f"Upper bounds, in the unit of the name. Those of tokens go on to the model's context (here {CONTEXT})."
    parts.append(_table("Buckets", about, ("histogram", "bounds"), histograms))
    parts.append("## Nudges\n\n" + NUDGES)
    tritons = [
        f"| `{name}` | {kind} | {unit} | {meaning} | {' · '.join(used[name])} |"
        for name, (kind, unit, meaning) in TRITONS.items()
        if name in used
    ]
    about = "Triton has more; these are what our dashboard, alerts and autoscalers ask for. Those of a GPU need one."
    parts.append(_table("Triton's own", about, ("name", "type", "unit", "meaning", "used by"), tritons))
    return "\n".join(parts)


def _row(name: str, spec: MetricSpec, used: Mapping[str, list[str]]) -> str:
    labels = "<br>".join(f"`{label}`: {values}" for label, values in spec.labels.items())
    cells = (f"`{name}`", spec.kind, unit_of(name, spec), labels, spec.description, " · ".join(used.get(name, ())))
    return "| " + " | ".join(cells) + " |"


def _table(title: str, about: str, heads: tuple[str, ...], rows: list[str]) -> str:
    lines = [
        f"## {title}",
        "",
        *([about, ""] if about else []),
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
    ]
    return "\n".join([*lines, *rows, ""])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write docs/metrics.md from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if it is not up to date")
    check = parser.parse_args().check
    text = render(catalog(CONTEXT), users())
    if not check:
        TARGET.write_text(text)
    elif TARGET.read_text() != text:
        print("docs/metrics.md is not up to date: run python tools/metrics_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
