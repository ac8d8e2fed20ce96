"""What a simulation reports: bursts, figures, fleets, and one sentence for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from morph_runtime.errors import ConfigError
from morph_runtime.simulate.__main__ import main
from morph_runtime.simulate.arrivals import Arrivals, steady
from morph_runtime.simulate.autoscaler import Autoscaler, ScalerSettings
from morph_runtime.simulate.engine_profile import profile_from
from morph_runtime.simulate.fleet import Fleet
from morph_runtime.simulate.result import bursts, summary, within
from morph_runtime.simulate.scenario import Policy, simulate
from tests.unit.simulate.reference import LAYERS, tiny_profile

FULL = Policy("full", 0)


def rush(at_s: float, count: int) -> list[tuple[float, int, int]]:
    return [(at_s + i / 1000, 16, 12) for i in range(count)]


def trace(*requests: tuple[float, int, int]) -> Arrivals:
    times, prompts, outputs = zip(*sorted(requests), strict=True)
    return Arrivals(np.array(times), np.array(prompts), np.array(outputs), "test")


def profile_values() -> dict[str, object]:
    profile = tiny_profile()
    return {
        "costs": profile.costs.to_json(), "capacities": profile.capacities.tolist(), "block_tokens": 4,
        "max_num_seqs": 4, "max_num_batched_tokens": 16,
    }  # fmt: skip


def test_a_burst_is_when_requests_wait_at_full_precision() -> None:
    load = trace((0.5, 16, 4), *rush(5.0, 20), (60.0, 16, 4))
    static = simulate(tiny_profile(), load, FULL)
    ((begin, end),) = bursts(static)
    assert 5.0 <= begin < 5.1
    waited = static.ttft_s > 0.2
    assert end == pytest.approx(float((static.arrival_s + static.ttft_s)[waited].max()), abs=1.0)
    assert within(np.array([1.0, begin, end - 1e-6, end, 60.0]), [(begin, end)]).tolist() == [0, 1, 1, 0, 0]


def test_bursts_are_defined_by_a_run_at_full_precision_alone() -> None:
    with pytest.raises(ValueError, match="full precision"):
        bursts(simulate(tiny_profile(), trace(*rush(0.0, 4)), Policy("w8", LAYERS)))


def test_tokens_of_a_static_rung_are_all_of_that_rung() -> None:
    found = summary(simulate(tiny_profile(), trace(*rush(0.0, 9)), Policy("w8", LAYERS)), slo_s=0.1)
    assert found["rung_shares"] == {"full": 0.0, "w8": 1.0, "w4": 0.0}
    assert found["full_precision_share"] == 0.0
    assert 0 < found["slo_violations"] < 9
    assert found["goodput_per_s"] == pytest.approx((9 - found["slo_violations"]) / found["seconds"])


def test_two_servers_share_a_rush_and_each_request_is_served_once() -> None:
    load = trace(*rush(0.0, 40))
    one, two = (Fleet(tiny_profile(), FULL, servers, None).run(load) for servers in (1, 2))
    np.testing.assert_allclose(np.sort(one.ttft_s), np.sort(simulate(tiny_profile(), load, FULL).ttft_s))
    assert [len(result.ttft_s) for result in two.results] == [20, 20]
    assert two.ttft_s.max() < 0.6 * one.ttft_s.max()


def test_a_lasting_queue_adds_servers_and_their_gpu_time_counts() -> None:
    scaling = ScalerSettings(start_s=30.0, up_stabilization_s=15.0)
    fleet = Fleet(tiny_profile(), FULL, 1, scaling).run(steady(8.0, 240.0, 16, 12, seed=1))
    assert [size for _, size in fleet.sizes][:2] == [1, 2]
    assert len(fleet.ttft_s) == 8 * 240
    assert fleet.gpu_s > fleet.end_s


def test_the_autoscaler_waits_before_it_adds_and_longer_before_it_removes() -> None:
    scaler = Autoscaler(ScalerSettings())
    sizes, now = [2], 0.0
    while now < 1500:
        now += 15.0
        pending = 40.0 if 100 <= now < 400 else 0.0
        sizes.append(scaler.desired(now, sizes[-1], pending, 0.0))
    assert sizes[:6] == [2] * 6  # an idle start takes nothing away at once
    first_more = 15.0 * next(i for i, (a, b) in enumerate(pairwise(sizes), 1) if b > a)
    assert 160 <= first_more <= 180  # the whole window asks for more
    assert sizes[int(first_more // 15)] == 4  # at most twice as many at a time
    assert max(sizes) == 8
    first_less = next(15.0 * i for i, (a, b) in enumerate(pairwise(sizes), 1) if b < a)
    assert first_less >= 400 + 585


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"capacities": [4, 5, 6, 7]}, "capacities"),
        ({"capacities": []}, "capacities"),
        ({"max_num_seqs": 0}, "below 1"),
    ],
)
def test_a_profile_that_does_not_hold_together_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        profile_from({**profile_values(), **change}, "x")


def test_a_request_that_no_level_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="49 tokens, but the profile's KV cache holds 48"):
        simulate(tiny_profile(), trace((0.0, 40, 9)), FULL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sweep", "colour=1"], "--sweep must be"),
        (["--sweep", "slo="], "--sweep must be"),
        (["--model-error", "0.1,0.2"], "--model-error must be"),
        (["--replicas", "none"], "--replicas must be"),
        (["--mode", "fast"], "--mode must be"),
        (["--static", "w2"], "not 'w2'"),
        (["--slo", "0"], "morph.ttft_slo_s"),
        (["--profile", "/nowhere/p.json"], "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, requests = tmp_path / "p.json", tmp_path / "t.json"
    profile.write_text(json.dumps(profile_values()))
    requests.write_text(json.dumps(trace(*rush(0.0, 2)).to_json()))
    assert main([str(requests), f"--profile={profile}", f"--out={tmp_path / 'o.json'}", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("morph: ") and words in line


def test_a_study_has_runs_sweeps_and_fleets(tmp_path: Path) -> None:
    profile, requests, out = tmp_path / "p.json", tmp_path / "t.json", tmp_path / "o.json"
    profile.write_text(json.dumps(profile_values()))
    requests.write_text(json.dumps(trace(*rush(0.0, 12), *rush(4.0, 12)).to_json()))
    arguments = ["--static=full", "--mode=balanced", "--ablation", "--sweep=delay=0,0.2", "--replicas=2"]
    assert main([str(requests), f"--profile={profile}", f"--out={out}", *arguments]) == 0
    found = json.loads(out.read_text())
    labels = ["static full", "balanced", "balanced, precision only", "balanced, growth only"]
    assert [run["label"] for run in found["runs"]] == labels
    assert [row["delay"] for row in found["sweeps"][0]["rows"]] == [0.0, 0.2]
    assert [fleet["servers"] for fleet in found["fleets"]] == [2, 2]
    assert len(found["runs"][0]["timeline"]["level"]) == len(found["runs"][0]["timeline"]["at_s"])


def test_ablations_take_away_what_they_say() -> None:
    profile = tiny_profile()
    assert set(profile.without_growth().capacities) == {profile.capacities[0]}
    same = profile.without_precision().costs
    assert same.seconds(2 * LAYERS, 3, 30, 0, 0) == same.seconds(0, 3, 30, 0, 0)
    wrong = replace(profile, costs=profile.mistaken((0.2,))).costs
    assert wrong.seconds(3, 2, 20, 5, 15) == pytest.approx(1.2 * profile.costs.seconds(3, 2, 20, 5, 15))
    rungs = len(profile.costs.rungs)
    padded = replace(profile.costs, step_sizes=(8,), padded_s=np.arange(1.0, rungs + 1)[:, None])
    staircase = replace(profile, costs=padded)
    assert staircase.without_precision().costs.seconds(2 * LAYERS, 0, 0, 5, 0) == padded.seconds(0, 0, 0, 5, 0)
    assert staircase.mistaken((0.2,)).seconds(3, 2, 20, 5, 15) == pytest.approx(1.2 * padded.seconds(3, 2, 20, 5, 15))


def test_the_simulator_loads_no_tensors() -> None:
    code = "import sys, morph_runtime.simulate.__main__; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
