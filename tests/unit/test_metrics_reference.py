"""docs/metrics.md is what the code says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from morph_backend.metric_catalog import COUNTER, GAUGE, MetricSpec, catalog, unit_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metrics_reference", ROOT / "tools" / "metrics_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(reference: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["metrics_reference.py", "--check"])
    assert reference.main() == 0, "run python tools/metrics_reference.py"


def test_a_stale_reference_is_told(
    reference: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "metrics.md"
    stale.write_text(reference.TARGET.read_text().replace("morph_level", "morph_depth"))
    monkeypatch.setattr(reference, "TARGET", stale)
    monkeypatch.setattr(sys, "argv", ["metrics_reference.py", "--check"])
    assert reference.main() == 1 and "python tools/metrics_reference.py" in capsys.readouterr().err


def test_a_new_metric_needs_no_more_than_its_declaration(reference: ModuleType) -> None:
    metrics = {**catalog(100), "morph_new_bytes": MetricSpec(GAUGE, "New ones.", labels={"kind": "`a`, `b`"})}
    row = "| `morph_new_bytes` | gauge | bytes | `kind`: `a`, `b` | New ones. | Panel |"
    assert row in reference.render(metrics, {**reference.users(), "morph_new_bytes": ["Panel"]}).splitlines()


def test_who_uses_a_metric_is_found_behind_suffixes_and_recorded_series(reference: ModuleType) -> None:
    used = reference.users()
    assert {"Time to first token", "**MorphServeSloBurn**", "`morph top`"} <= set(
        used["vllm:time_to_first_token_seconds"]
    )
    assert {"HPA", "KEDA"} <= set(used["nv_inference_queue_duration_us"])


def test_a_metric_of_tritons_that_nobody_has_described_is_refused(reference: ModuleType) -> None:
    with pytest.raises(ValueError, match="describe nv_new in TRITONS"):
        reference.render(catalog(100), {"nv_new": ["Panel"]})


def test_every_metric_has_a_unit_and_a_section(reference: ModuleType) -> None:
    for name, spec in catalog(100).items():
        assert unit_of(name, spec), f"{name}: give it a unit"
        assert name.startswith(tuple(prefix for prefix, _, _ in reference.SECTIONS))
        assert spec.kind != COUNTER or name.endswith("_total")
