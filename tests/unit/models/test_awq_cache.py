"""Blocks that an AWQ layer has written serve the full-precision layer, and the reverse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.driver import Driver, PlainKV, Run
from morph_runtime.kernels.rung import Rung
from morph_runtime.models.decoder import Decoder
from morph_runtime.weights import awq_fill
from weights.awq_packer import make_awq
from weights.tiny_checkpoint import Parts, make_llama, open_parts

PROMPTS = 20


def logits(parts: Parts, writes: Rung, reads: Rung) -> torch.Tensor:
    """[PROMPTS, vocab] after 48 tokens: the first 47 run at the rung `writes`, the last at `reads`."""
    kv = PlainKV(parts.spec, 8 * PROMPTS, 8, torch.float32)
    driver = Driver(Decoder(parts.spec, parts.static, kv, parts.scratch()), kv, parts.spec)
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(parts.spec.vocab, (PROMPTS, 48), generator=generator).tolist()
    runs = [Run(prompt, 1, 47) for prompt in prompts]
    for rung in (writes, reads):
        driver.step(runs, [parts.layer(i, rung) for i in range(parts.spec.layers)])
    return torch.stack([run.logits[0] for run in runs])


def harm(parts: Parts, writes: Rung, reads: Rung) -> float:
    """How far logits are from those over blocks of the reader's own precision, relative."""
    own = logits(parts, reads, reads)
    return float((logits(parts, writes, reads) - own).norm() / own.norm())


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("writes,reads", [("w4", "full"), ("full", "w4")])
def test_blocks_of_either_precision_serve_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_heads: int, writes: Rung, reads: Rung
) -> None:
    make_llama(tmp_path / "m", num_key_value_heads=kv_heads, attention_bias=True, initializer_range=0.05)
    awq = make_awq(tmp_path / "m", tmp_path / "awq")
    rounded = harm(open_parts(tmp_path / "m"), writes, reads)
    remedied = harm(open_parts(tmp_path / "m", awq=awq), writes, reads)
    monkeypatch.setattr(awq_fill, "recover_v_scale", lambda q, f, n, m: (torch.ones(len(q)), torch.ones(len(q))))
    left_alone = harm(open_parts(tmp_path / "m", awq=awq), writes, reads)
    assert remedied < 2 * rounded, "no worse than what quantization itself does to K and V"
    if kv_heads == 4:
        assert left_alone > 2.5 * remedied, "the test must fail without the remedy"
    else:
        assert left_alone == remedied, "nothing is rescaled where v_proj and o_proj have different shapes"
