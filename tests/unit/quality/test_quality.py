"""What levels cost, held against `transformers` with the weights of the same mix."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.reference import put_weights
from morph_runtime.profile.forward import Walk
from morph_runtime.profile.quality import measure
from morph_runtime.profile.weights import FORM_RUNG, Mix
from quality.tiny_session import forward_for, open_store, random_windows
from weights.awq_packer import make_awq
from weights.tiny_checkpoint import make_llama, open_parts

MIXES: list[Mix] = [("w8", "full", "full"), ("w8", "w8", "w8"), ("full", "full", "w4"), ("w4", "w8", "full")]


@pytest.mark.parametrize("lead", [0, 1, 2])
def test_figures_equal_a_direct_computation(tmp_path: Path, lead: int) -> None:
    model = make_llama(tmp_path, num_hidden_layers=3)
    store, windows = open_store(tmp_path), random_windows(lead=lead)
    found = measure(forward_for(store, windows), store, windows, MIXES)
    ids, first = torch.tensor(windows.tokens), max(1, lead)
    with torch.inference_mode():
        full = model(ids).logits[:, first - 1 : -1].log_softmax(-1)
    assert found["full", "full", "full"].kl == 0 and found["full", "full", "full"].top1 == 1
    parts = open_parts(tmp_path)
    for mix in [("full",) * 3, *MIXES]:
        put_weights(model, parts, [FORM_RUNG[form] for form in mix])
        with torch.inference_mode():
            there = model(ids).logits[:, first - 1 : -1].log_softmax(-1)
        figures = found[mix]
        loss = F.nll_loss(there.flatten(0, 1), ids[:, first:].flatten())
        full_loss = F.nll_loss(full.flatten(0, 1), ids[:, first:].flatten())
        assert figures.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert figures.loss_change == pytest.approx(float(loss - full_loss), abs=1e-4)
        assert figures.kl == pytest.approx(float((full.exp() * (full - there)).sum(-1).mean()), abs=2e-5)
        assert figures.top1 == pytest.approx(float((full.argmax(-1) == there.argmax(-1)).float().mean()), abs=0.02)
    assert found["w8", "w8", "w8"].kl < found["full", "full", "w4"].kl


def test_w4_of_an_awq_checkpoint_is_measured_beside_rounding(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "m", num_key_value_heads=4)
    awq = make_awq(tmp_path / "m", tmp_path / "awq")
    store, windows = open_store(tmp_path / "m", awq), random_windows()
    mixes: list[Mix] = [("w4", "w4"), ("awq", "awq"), ("full", "awq")]
    found = measure(forward_for(store, windows), store, windows, mixes)
    put_weights(model, open_parts(tmp_path / "m", awq=awq), ["full", "w4"])
    ids = torch.tensor(windows.tokens)
    with torch.inference_mode():
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found["full", "awq"].loss == pytest.approx(float(loss), abs=1e-4)
    assert found["w4", "w4"].loss != found["awq", "awq"].loss


def test_what_two_mixes_share_may_be_computed_once(tmp_path: Path) -> None:
    make_llama(tmp_path, num_hidden_layers=3)
    store, windows = open_store(tmp_path), random_windows(1)
    forward = forward_for(store, windows)
    with torch.inference_mode():
        walk = Walk(forward, store, windows.tokens[0])
        for mix in [*MIXES, *reversed(MIXES)]:
            alone = Walk(forward, store, windows.tokens[0]).run(mix)
            assert torch.equal(walk.run(mix), alone)
        changed = walk.run_changed(1, "w4")
        assert torch.equal(changed, Walk(forward, store, windows.tokens[0]).run(("w8", "w4", "full")))
        assert torch.equal(walk.run(MIXES[0]), Walk(forward, store, windows.tokens[0]).run(MIXES[0]))


def test_the_error_of_a_change_is_that_of_its_windows(tmp_path: Path) -> None:
    make_llama(tmp_path)
    store, windows = open_store(tmp_path), random_windows(4)
    mix: Mix = ("w4", "w4")
    together = measure(forward_for(store, windows), store, windows, [mix])[mix]
    singles = []
    for tokens in windows.tokens:
        one = type(windows)((tokens,), 0, 4.0, "text", "0" * 64)
        figures = measure(forward_for(store, one), store, one, [mix])[mix]
        assert figures.loss_change_error == 0
        singles.append(figures.loss_change)
    changes = torch.tensor(singles, dtype=torch.float64)
    assert together.loss_change == pytest.approx(float(changes.mean()))
    assert together.loss_change_error == pytest.approx(float(changes.std()) / 2)
