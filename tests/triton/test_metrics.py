"""What stands on Triton's metrics endpoint."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from morph_backend.metric_catalog import catalog
from queries import exported
from triton_server import TritonServer, fake_repository
from wire_client import generate, post, until

pytestmark = pytest.mark.triton


def test_what_is_exported_is_what_the_reference_describes(server: TritonServer) -> None:
    """Every metric, its type, its HELP and its labels; docs/metrics.md is made from the same catalog."""
    for _ in range(2):
        generate(server, "hello world", max_tokens=10)
    described = {
        name: (spec.kind, spec.description, {"model", "version", *spec.labels}) for name, spec in catalog(512).items()
    }

    def ours() -> dict[str, tuple[str, str, set[str]]]:
        text = server.metrics_text()
        series = exported(text)
        kinds, helps = (dict(re.findall(rf"^# {what} (\S+) (.*)$", text, re.M)) for what in ("TYPE", "HELP"))
        own = [name for name in kinds if name.startswith(("vllm:", "morph_", "nv_trt_llm_"))]
        return {
            name: (kinds[name], helps[name], series.get(name) or series.get(f"{name}_count") or set()) for name in own
        }

    until(lambda: ours().keys() >= described.keys(), what="the metrics of the catalog")
    assert ours() == described


def settle(server: TritonServer) -> None:
    """Wait until no request runs and what was counted has been exported."""

    def counted() -> list[str]:
        return [
            line for line in server.metrics_text().splitlines() if re.match("(vllm:|morph_(tokens|requests))", line)
        ]

    until(lambda: server.metric("vllm:num_requests_running") == 0)
    seen: list[tuple[float, list[str]]] = []
    until(lambda: (seen.append((time.monotonic(), counted())), steady(seen))[1], what="steady counts")


def steady(seen: list[tuple[float, list[str]]]) -> bool:
    changed = max((at for at, lines in seen if lines != seen[-1][1]), default=seen[0][0])
    return seen[-1][0] - changed > 0.5


def test_the_counts_are_exact(server: TritonServer) -> None:
    names = (
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_count",
        "vllm:time_per_output_token_seconds_count", "vllm:e2e_request_latency_seconds_count",
        "vllm:request_prompt_tokens_sum", "vllm:request_generation_tokens_sum",
    )  # fmt: skip
    settle(server)
    before = {name: server.metric(name) for name in names}
    by_rung = {rung: server.metric("morph_tokens_total", rung=rung) for rung in ("full", "w8", "w4")}
    done = server.metric("morph_requests_total", outcome="length")
    for _ in range(3):
        body = generate(server, "hello world", max_tokens=10, return_num_input_tokens=True)
    until(lambda: server.metric("morph_requests_total", outcome="length") == done + 3)
    settle(server)
    prompt = int(body["num_input_tokens"])
    gained = {name: server.metric(name) - before[name] for name in names}
    assert list(gained.values()) == [3 * prompt, 30, 3, 27, 3, 3 * prompt, 30]
    gained_rungs = {rung: server.metric("morph_tokens_total", rung=rung) - n for rung, n in by_rung.items()}
    w4 = 3 * (0.25 + 0.5 + 0.75 + 6)
    assert gained_rungs == {"full": pytest.approx(30 - w4), "w8": 0.0, "w4": pytest.approx(w4)}


def test_the_engines_snapshot_is_shown(server: TritonServer) -> None:
    assert server.metric("morph_level") == 1 and server.metric("morph_level_max") == 4
    assert server.metric("morph_layers", rung="w4") == 1 and server.metric("morph_layers", rung="full") == 3
    assert server.metric("morph_shifts_total", direction="down", rung="w4") == 3
    assert server.metric("morph_shifts_total", direction="up", rung="full") == 2
    assert server.metric("morph_decisions_total", action="down", reason="kv_wait") == 1
    assert server.metric("morph_mode", mode="balanced") == 1 and server.metric("morph_mode", mode="off") == 0
    assert server.metric("morph_kv_dtype", dtype="bfloat16") == 1
    assert server.metric("morph_engine_up") == 1


def test_the_signals_of_load_balancers_are_plain_numbers(server: TritonServer) -> None:
    """Triton's ORCA headers take these three by a regular expression that knows no exponent."""
    text = server.metrics_text()
    for kind, value in (("tokens_per", 16), ("max", 70), ("used", None)):
        found = re.findall(
            rf'nv_trt_llm_kv_cache_block_metrics\{{[^}}]*="{kind}"[^}}]*\}} (\d+(?:\.\d+)?)$', text, re.M
        )
        assert len(found) == 1 and value in (None, float(found[0])), kind


@pytest.fixture
def quiet(tmp_path: Path, tiny_model) -> Iterator[TritonServer]:
    repository = fake_repository(tmp_path / "repository")
    config = repository / "morph" / "config.pbtxt"
    text = config.read_text()
    names = "REPORT_CUSTOM_METRICS|QUEUE_NUDGE|LOG_DECISIONS"
    changed, count = re.subn(rf'(({names})" value: \{{ string_value: )"true"', r'\1"false"', text)
    assert count == 3
    config.write_text(changed)
    server = TritonServer(tmp_path, {"MORPH_MODEL": str(tiny_model), "MORPH_MODEL_REPOSITORY": str(repository)})
    try:
        yield server.wait_ready()
    finally:
        assert server.stop() == 0, server.output()


def test_metrics_and_nudges_can_be_switched_off(quiet: TritonServer) -> None:
    for _ in range(3):
        assert post(quiet, {"text_input": "abc", "max_tokens": 3})[0] == 200
    text = quiet.metrics_text()
    assert "nv_inference_request_success" in text
    assert "morph_level" not in text and "vllm:" not in text
