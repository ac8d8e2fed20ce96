"""The recording rules, the alerts and KEDA's queries on series made up for them, by `promtool test rules`."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from morph_backend.metric_catalog import catalog
from morph_runtime.config import MODES, MorphSettings
from morph_runtime.morph.controller import Controller
from queries import ALERTS
from triton_server import ROOT

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
STEP_S = 15
OURS = 'job="morphserve/morphserve",namespace="morphserve",pod="a",instance="a",model="morph",version="1"'
LEVELS = 12


@dataclass(frozen=True)
class Case:
    """Series as promtool writes them (one value every 15 s), and what a query finds in them after some minutes."""

    series: dict[str, str]
    minutes: int
    query: str
    value: float


def alert(name: str, fires: bool, series: dict[str, str], minutes: int) -> Case:
    return Case(series, minutes, f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)', float(fires))


def check(folder: Path, *cases: Case) -> None:
    tests = []
    for case in cases:
        wanted = [{"labels": "{}", "value": case.value}]
        series = [{"series": name, "values": values} for name, values in case.series.items()]
        query = {"expr": case.query, "eval_time": f"{case.minutes}m", "exp_samples": wanted}
        tests.append({"interval": f"{STEP_S}s", "input_series": series, "promql_expr_test": [query]})
    whole: dict[str, Any] = {"rule_files": [str(ALERTS)], "evaluation_interval": f"{STEP_S}s", "tests": tests}
    (folder / "cases.yml").write_text(yaml.safe_dump(whole))
    done = subprocess.run(["promtool", "test", "rules", "cases.yml"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def always(value: float, minutes: int = 60) -> str:
    return f"{value}x{minutes * 60 // STEP_S}"


def grows(by: float, minutes: int = 60) -> str:
    """A counter that grows by so much every 15 s."""
    return f"0+{by}x{minutes * 60 // STEP_S}"


def test_a_server_that_is_starting_is_not_down_and_one_that_does_not_come_up_is_told(tmp_path: Path) -> None:
    starting = {f"up{{{OURS}}}": always(0)}
    died = {f"up{{{OURS}}}": f"1x20 {always(0)}"}
    no_engine = {f"up{{{OURS}}}": always(1), f"morph_engine_up{{{OURS}}}": always(0)}
    other = {'up{job="other/triton",instance="b"}': f"1x20 {always(0)}"}
    check(
        tmp_path,
        alert("MorphServeDown", False, starting, 15),
        alert("MorphServeNotStarted", False, starting, 15),
        alert("MorphServeNotStarted", True, starting, 25),
        alert("MorphServeDown", True, died, 8),
        alert("MorphServeNotStarted", False, died, 8),
        alert("MorphServeNotStarted", True, died, 50),
        alert("MorphServeDown", True, no_engine, 5),
        alert("MorphServeDown", False, other, 8),
    )


@pytest.mark.parametrize("cap", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("mode", MODES)
def test_stuck_at_the_top_is_what_mode_and_cap_permit(tmp_path: Path, mode: str, cap: float) -> None:
    controller = Controller(MorphSettings(), LEVELS)
    controller.set_mode(mode, cap)
    deepest = controller.deepest

    def server(level: int, feasible: bool = True) -> dict[str, str]:
        modes = {f'morph_mode{{{OURS},mode="{name}"}}': always(float(name == mode)) for name in MODES}
        gauges = {"level": level, "level_max": LEVELS, "cap": cap, "slo_feasible": float(feasible)}
        return modes | {f"morph_{name}{{{OURS}}}": always(value) for name, value in gauges.items()}

    check(
        tmp_path,
        alert("MorphServeStuckAtTop", deepest > 0, server(deepest), 15),
        alert("MorphServeStuckAtTop", False, server(max(0, deepest - 1)), 15),
        alert("MorphServeStuckAtTop", deepest > 0, server(0, feasible=False), 15),
        # MORPH_PIN, which says `off` and keeps its level.
        alert("MorphServeStuckAtTop", mode != "off", server(LEVELS), 15),
    )


def test_a_short_visit_to_the_deepest_level_is_a_burst(tmp_path: Path) -> None:
    server = {f'morph_mode{{{OURS},mode="balanced"}}': always(1), f"morph_cap{{{OURS}}}": always(1)}
    server |= {
        f"morph_level_max{{{OURS}}}": always(LEVELS),
        f"morph_level{{{OURS}}}": f"0x40 {LEVELS}x28 0 {LEVELS}x28",
    }
    server |= {f"morph_slo_feasible{{{OURS}}}": "1x40 0x28 1 0x28"}
    check(tmp_path, *(alert("MorphServeStuckAtTop", False, server, minutes) for minutes in (12, 17, 20, 24)))


@pytest.mark.parametrize("target_s, fires", [(12, True), (45, False)])
def test_a_target_above_ten_seconds_can_be_missed(tmp_path: Path, target_s: float, fires: bool) -> None:
    """All first tokens come after 20 to 40 s."""
    bounds = catalog(100)["vllm:time_to_first_token_seconds"].buckets
    series = {
        f'vllm:time_to_first_token_seconds_bucket{{{OURS},le="{bound:g}"}}': grows(float(bound >= 40))
        for bound in (*bounds, float("inf"))
    }
    series = {name.replace('le="inf"', 'le="+Inf"'): values for name, values in series.items()}
    series |= {
        f"nv_inference_queue_duration_us{{{OURS}}}": grows(0),
        f"nv_inference_request_success{{{OURS}}}": grows(1),
    }
    series |= {f"morph_ttft_slo_seconds{{{OURS}}}": always(target_s)}
    check(tmp_path, alert("MorphServeSloBurn", fires, series, 10))


def queue(labels: str, queue_s: float) -> dict[str, str]:
    """One server's queue: a request every 15 s that has waited so long, and 3 that wait now."""
    return {
        f"nv_inference_queue_duration_us{{{labels}}}": grows(queue_s * 1e6),
        f"nv_inference_request_success{{{labels}}}": grows(1),
        f"nv_inference_pending_request_count{{{labels}}}": always(3),
        f'vllm:time_to_first_token_seconds_bucket{{{labels},le="+Inf"}}': grows(1),
    }


def test_only_this_deployments_series_are_recorded(tmp_path: Path) -> None:
    compose = queue('job="morphserve",instance="triton:8002",model="morph",version="1"', 1)
    others = queue('job="other/triton",instance="c",model="morph",version="1"', 9)
    for record in ("morphserve:queue_seconds:mean", "morphserve:ttft_seconds:p95"):
        count = f"count({record}) or vector(0)"
        check(tmp_path, Case(compose | queue(OURS, 2) | others, 10, count, 2))


def test_keda_asks_for_the_sum_over_this_deployments_servers(tmp_path: Path) -> None:
    def server(job: str, namespace: str, pod: str) -> str:
        return f'job="{job}",namespace="{namespace}",pod="{pod}",instance="{pod}",model="morph",version="1"'

    job = "morphserve/morphserve"
    series = queue(server(job, "morphserve", "a"), 2) | queue(server(job, "morphserve", "b"), 4)
    series |= queue(server("test/morphserve", "test", "c"), 8) | queue(server("x/triton", "morphserve", "d"), 16)
    scaled = yaml.safe_load((ROOT / "deploy/kubernetes/overlays/autoscaled-keda/scaledobject.yaml").read_text())
    waited, pending = (trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"])
    check(tmp_path, Case(series, 10, f"round({waited}, 0.001)", 2 + 4), Case(series, 10, pending, 3 + 3))
