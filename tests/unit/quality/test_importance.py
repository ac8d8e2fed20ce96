"""Layer importance: the scores against a plain computation, and that what matters goes last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.reference import put_weights
from morph_runtime.kernels.rung import Rung
from morph_runtime.profile.importance import PAPER_WEIGHTS, find_order
from quality.tiny_session import forward_for, open_store, random_windows
from weights.tiny_checkpoint import make_llama, open_parts


def mean_cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double(), b.double(), dim=-1).mean())


@pytest.mark.parametrize("rung", ["w8", "w4"])
@pytest.mark.parametrize("weights", [PAPER_WEIGHTS, (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)])
def test_scores_and_order_equal_a_plain_computation(
    tmp_path: Path, rung: Rung, weights: tuple[float, float, float]
) -> None:
    layers = 4
    model = make_llama(tmp_path, num_hidden_layers=layers)
    parts, windows = open_parts(tmp_path), random_windows()
    ids = torch.tensor(windows.tokens)

    def run(quantized: set[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits, and each layer's input and output."""
        put_weights(model, parts, [rung if number in quantized else "full" for number in range(layers)])
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(
                lambda _, args, kwargs, out: (inputs.append(args[0]), outputs.append(out))[2:] or None,
                with_kwargs=True,
            )
            for layer in model.model.layers
        ]
        with torch.inference_mode():
            logits = model(ids).logits
        for hook in hooks:
            hook.remove()
        return logits, inputs, outputs

    _, inputs, outputs = run(set())
    lts = [mean_cosine(outputs[i], inputs[i]) for i in range(layers)]
    # Only the layer itself is quantized, so its input is that at full precision.
    lrs = [mean_cosine(outputs[i], run({i})[2][i]) for i in range(layers)]
    expected: list[tuple[int, tuple[float, ...]]] = []
    chosen: set[int] = set()
    while len(chosen) < layers:
        now = run(chosen)[0]
        rated = []
        for j in set(range(layers)) - chosen:
            scores = lts[j], lrs[j], mean_cosine(now, run({*chosen, j})[0])
            rated.append((sum(w * s for w, s in zip(weights, scores, strict=True)), j, scores))
        lis, best, scores = max(rated)
        chosen.add(best)
        expected.append((best, (*scores, lis)))

    store = open_store(tmp_path)
    found = find_order(forward_for(store, windows), store, windows, rung, weights)
    assert [one.layer for one in found] == [layer for layer, _ in expected]
    for one, (_, values) in zip(found, expected, strict=True):
        assert (one.lts, one.lrs, one.mds, one.lis) == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("sensitive", [0, 2])
def test_a_layer_that_suffers_goes_last_and_one_that_does_nothing_goes_first(tmp_path: Path, sensitive: int) -> None:
    make_llama(tmp_path, num_hidden_layers=4)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, weight in tensors.items():
        if name.startswith(f"model.layers.{sensitive}.") and "_proj" in name:
            # One outlier per group takes all the 4-bit codes.
            weight[:, ::128] *= 60
        if name.startswith("model.layers.1.") and ("o_proj" in name or "down_proj" in name):
            weight.zero_()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    store, windows = open_store(tmp_path), random_windows()
    order = [one.layer for one in find_order(forward_for(store, windows), store, windows, "w4")]
    assert order[0] == 1 and order[-1] == sensitive


def test_equal_scores_leave_the_order_front_to_back(tmp_path: Path) -> None:
    make_llama(tmp_path, num_hidden_layers=3)
    store, windows = open_store(tmp_path), random_windows(1)
    # Without weight, all scores are 0.
    found = find_order(forward_for(store, windows), store, windows, "w4", (0.0, 0.0, 0.0))
    assert [one.layer for one in found] == [0, 1, 2]
