"""`python -m morph_runtime.profile` on the demo model: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from morph_runtime.profile.__main__ import main
from morph_runtime.profile.order_file import read_order_file
from morph_runtime.profile.text import read_windows
from weights.tiny_checkpoint import make_llama

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "models" / "morph-demo"
TEXT = ROOT / "LICENSE"
FEW = ["--windows=2", "--window-tokens=64", "--threads=1"]


def quality(out: Path, *more: str) -> int:
    return main(["quality", str(DEMO), f"--text={TEXT}", f"--out={out}", *FEW, *more])


def test_the_demo_models_perplexity_is_that_of_transformers(tmp_path: Path) -> None:
    assert quality(tmp_path / "q.json", "--dtype=float32", "--ladder=w4", "--levels=12") == 0
    found = json.loads((tmp_path / "q.json").read_text())
    windows = read_windows(TEXT, DEMO, 64, 2)
    ids = torch.tensor(windows.tokens)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(ids).logits[:, windows.first - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, windows.first :].flatten())
    assert found["full"]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert found["text"]["predicted_tokens"] == windows.predicted
    (row,) = found["series"][0]["rows"]
    assert row["kl"] > 0 and row["top1"] < 1 and row["layer_bytes_share"] < 0.3
    assert (row["full"], row["w8"], row["w4"]) == (0, 0, 12)


def test_ladders_orders_and_levels_make_the_series(tmp_path: Path) -> None:
    out = tmp_path / "q.json"
    more = ["--ladder=w8,w4", "--ladder=w4", "--order=back_to_front", "--order=random:1", "--levels=1,12,13"]
    assert quality(out, *more) == 0
    series = json.loads(out.read_text())["series"]
    assert [(one["ladder"], one["order"]) for one in series] == [
        (["w8", "w4"], "back_to_front"),
        (["w8", "w4"], "random:1"),
        (["w4"], "back_to_front"),
        (["w4"], "random:1"),
    ]
    assert [[row["level"] for row in one["rows"]] for one in series] == [[1, 12, 13]] * 2 + [[1, 12]] * 2
    assert series[0]["layer_order"] == list(range(11, -1, -1))
    assert series[1]["layer_order"] == series[3]["layer_order"] != list(range(12))
    # With all layers at a rung, the order is no matter.
    assert series[2]["rows"][1] == series[3]["rows"][1]


def test_without_levels_about_six_per_rung_and_the_ends_are_measured(tmp_path: Path) -> None:
    assert quality(tmp_path / "q.json", "--ladder=w4", "--every=5") == 0
    (one,) = json.loads((tmp_path / "q.json").read_text())["series"]
    assert [row["level"] for row in one["rows"]] == [5, 10, 12]


def test_a_found_order_can_be_measured(tmp_path: Path) -> None:
    order = tmp_path / "order.json"
    arguments = ["profile", str(DEMO), f"--text={TEXT}", f"--out={order}", "--rung=w4", *FEW, "--windows=1"]
    assert main(arguments) == 0
    found = read_order_file(order)
    assert sorted(found.rungs["w4"].order) == list(range(12)) and list(found.rungs) == ["w4"]
    assert found.text.windows == 1 and not found.awq
    assert quality(tmp_path / "q.json", "--ladder=w4", f"--order={order}", "--levels=3") == 0
    (one,) = json.loads((tmp_path / "q.json").read_text())["series"]
    assert one["layer_order"] == found.rungs["w4"].order and one["order"] == "order.json"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--levels=x"], "--levels must be whole numbers"),
        (["--levels=25"], "--levels names 25, but the deepest level is 24"),
        (["--levels=3", "--every=2"], "exclude each other"),
        (["--ladder=w2"], "morph.ladder must be one of w8, w4"),
        (["--ladder=w4,w8"], "from mild to deep"),
        (["--ladder=w8", "--awq=x"], "no ladder has w4"),
        (["--order=3,3"], "morph.order must be"),
        (["--order=random:x"], "random:SEED takes a whole number"),
        (["--window-tokens=4096"], "the model's context is 2048"),
        (["--window-tokens=1"], "at least 16"),
        (["--windows=0"], "--windows must be at least 1"),
        (["--dtype=int8"], "model.dtype must be one of"),
        (["--text={tmp}/none"], "none cannot be read"),
        (["--awq={tmp}"], "config.json"),
        (["--out={tmp}/no/q.json", "--levels=1"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert quality(tmp_path / "q.json", *(text.format(tmp=tmp_path) for text in arguments)) == 2
    (sentence,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("morph:")]
    assert message in sentence


@pytest.mark.parametrize("weights", ["1,2", "a,b,c", "0,0,0", "-1,1,1", "nan,1,1"])
def test_weights_that_weigh_nothing_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], weights: str
) -> None:
    arguments = ["profile", str(DEMO), f"--text={TEXT}", f"--out={tmp_path / 'o.json'}", f"--weights={weights}"]
    assert main(arguments) == 2
    assert "--weights must be three numbers" in capfd.readouterr().err


def test_a_model_folder_that_is_none_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_llama(tmp_path / "m")
    for folder, message in ((tmp_path / "none", "does not exist"), (tmp_path / "m", "has no tokenizer.json")):
        assert main(["quality", str(folder), f"--text={TEXT}", "--out=x.json"]) == 2
        assert message in capfd.readouterr().err
