"""The dashboard and the alerts: every query names what the server really exports, and finds it under load."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from queries import (
    ALERTS,
    SCRAPER_LABELS,
    Query,
    dashboard,
    dashboard_queries,
    exported,
    grouping,
    rules,
    selectors,
)
from triton_server import ROOT, TritonServer, free_ports
from wire_client import GrpcStream, generate, until

GPU = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes", "nv_gpu_power_usage"}
"""What Triton exports where there is a GPU (docs of Triton's metrics), with the label gpu_uuid."""
RULES = [Query(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]


def complaints(queries: list[Query], series: dict[str, set[str]]) -> list[str]:
    """Names and labels that no series has."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    found = []
    for query in queries:
        known = SCRAPER_LABELS | {"le"}
        for name, labels in selectors(query.text):
            if name in recorded or name == "up":
                known |= {"model", "instance", "job"}
            elif name in GPU:
                known |= {"gpu_uuid"}
            elif name in series:
                known |= series[name]
                found += [f"{query.place}: {name} has no {label}" for label in labels - series[name] - SCRAPER_LABELS]
            else:
                found.append(f"{query.place}: there is no {name}")
        found += [f"{query.place}: groups by {label}" for label in grouping(query.text) - known - {"gpu_uuid"}]
    return found


def test_the_dashboard_has_its_rows_and_every_panel_says_what_it_shows() -> None:
    panels = dashboard()["panels"]
    rows = [p["title"] for p in panels if p["type"] == "row"]
    assert rows == ["Now", "Load", "Latency", "Morph state", "Quality share", "GPU"]
    assert len({p["id"] for p in panels}) == len(panels)
    assert all(p["title"] and p["targets"] for p in panels if p["type"] != "row")
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    uids = {t["datasource"]["uid"] for p in panels for t in p.get("targets", ())}
    assert uids == {source["datasources"][0]["uid"]}


def test_every_query_can_be_parsed() -> None:
    for query in dashboard_queries() + RULES:
        promql_parser.parse(query.text)
    assert len(dashboard_queries()) > 40


@pytest.mark.triton
def test_every_name_and_label_is_exported(server: TritonServer) -> None:
    generate(server, "hello world", max_tokens=10)
    queries = dashboard_queries() + RULES
    until(lambda: "vllm:e2e_request_latency_seconds_count" in server.metrics_text(), what="the metrics")
    assert not (found := complaints(queries, exported(server.metrics_text()))), "\n" + "\n".join(found)


def test_a_query_for_what_is_not_there_is_complained_of() -> None:
    wrong = Query("x", 'sum by (nobody) (morph_level{nothing="1"} + no_such)')
    found = complaints([wrong], {"morph_level": {"model"}})
    assert found == ["x: morph_level has no nothing", "x: there is no no_such", "x: groups by nobody"]


class Prometheus:
    """A real one, scraping one server every 0.2 s."""

    def __init__(self, folder: Path, target: str) -> None:
        (self.port,) = free_ports(1)
        config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        # Ranges of minutes have to be filled; here one of seconds will do.
        (folder / "alerts.yml").write_text(ALERTS.read_text().replace("[1m]", "[3s]"))
        self.log = (folder / "prometheus.log").open("wb")
        arguments = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        self.process = subprocess.Popen(
            ["prometheus", *arguments, f"--web.listen-address=127.0.0.1:{self.port}"],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def query(self, text: str) -> list[Any]:
        address = f"http://127.0.0.1:{self.port}/api/v1/query?query={urllib.parse.quote(text)}"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return list(json.loads(answer.read())["data"]["result"])
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it is still starting
                return []
            raise AssertionError(f"{text}: {error.read().decode()}") from None
        except OSError:
            return []

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.log.close()


@pytest.fixture(scope="module")
def prometheus(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    started = Prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{server.metrics}")
    try:
        until(lambda: started.query("morph_engine_up"), what="a scrape")
        yield started
    finally:
        started.stop()


@pytest.mark.triton
def test_every_query_finds_something_under_load(server: TritonServer, prometheus: Prometheus) -> None:
    def load() -> list[GrpcStream]:
        return [GrpcStream(server).ask("hello world", {"max_tokens": 60}) for _ in range(12)]

    def empty() -> list[str]:
        texts = {q.text.replace("[10s]", "[3s]"): q.place for q in dashboard_queries() + RULES[:2]}
        names = {text: {name for name, _ in selectors(text)} for text in texts}
        return [
            f"{place}: {text}" for text, place in texts.items() if not names[text] & GPU and not prometheus.query(text)
        ]

    for _ in range(4):
        streams = load()
        for stream in streams:
            stream.rest()
        if not (left := empty()):
            break
    assert not left, "\n" + "\n".join(left)
    values = {result["metric"]["rung"]: float(result["value"][1]) for result in prometheus.query(
        "sum by (rung) (rate(morph_tokens_total[3s])) / ignoring (rung) group_left () sum(rate(morph_tokens_total[3s]))"
    )}  # fmt: skip
    assert sum(values.values()) == pytest.approx(1.0) and set(values) == {"full", "w8", "w4"}


@pytest.mark.triton
def test_no_alert_fires_on_a_healthy_server(server: TritonServer, prometheus: Prometheus) -> None:
    assert prometheus.query("ALERTS") == []
    for rule in rules():
        if "alert" in rule:
            assert prometheus.query(rule["expr"].replace("[10m]", "[3s]").replace("[5m]", "[3s]")) == [], rule["alert"]
