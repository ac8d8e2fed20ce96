"""Runs a decoder on a set of prompts and holds it against a `transformers` model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from models.driver import Driver, PlainKV, Run
from morph_runtime.kernels.rung import Rung
from morph_runtime.models.decoder import Decoder
from weights.tiny_checkpoint import Parts


def runs(vocab: int, seed: int = 1) -> list[Run]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((37, 3, 7), (5, 14, 64), (64, 9, 13), (1, 12, 1), (90, 6, 33))
    return [
        Run(torch.randint(vocab, (length,), generator=generator).tolist(), wanted, chunk)
        for length, wanted, chunk in sizes
    ]


def drive(parts: Parts, rungs: Sequence[Rung], dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Run]:
    kv = PlainKV(parts.spec, 64, 8, dtype)
    driver = Driver(Decoder(parts.spec, parts.static, kv, parts.scratch()), kv, parts.spec)
    work = runs(parts.spec.vocab, seed)
    driver.finish(work, [parts.layer(i, rung) for i, rung in enumerate(rungs)])
    return work


def expect_same(model: PreTrainedModel, work: list[Run], atol: float) -> None:
    for run in work:
        with torch.no_grad():
            logits = model(torch.tensor([run.prompt + run.tokens[:-1]])).logits[0, len(run.prompt) - 1 :]
        torch.testing.assert_close(torch.stack(run.logits), logits, atol=atol, rtol=1e-4)
        assert run.tokens == logits.argmax(-1).tolist()


def put_weights(model: PreTrainedModel, parts: Parts, rungs: Sequence[Rung]) -> None:
    """Give the reference model the values that the layers at these rungs compute with."""
    spec = parts.spec
    with torch.no_grad():
        for number, rung in enumerate(rungs):
            layer, target = parts.layer(number, rung), model.model.layers[number]
            attention, mlp = target.self_attn, target.mlp
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            modules = (qkv, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])
            for linear, stacked in zip(layer.linears, modules, strict=True):
                sizes = [module.weight.shape[0] for module in stacked]
                for module, rows in zip(stacked, linear.dequantize().split(sizes), strict=True):
                    module.weight.copy_(rows)
                if linear.bias is not None:
                    for module, bias in zip(stacked, linear.bias.split(sizes), strict=True):
                        module.bias.copy_(bias)
            target.input_layernorm.weight.copy_(layer.input_norm)
            target.post_attention_layernorm.weight.copy_(layer.post_norm)
            if layer.qk_norm is not None:
                attention.q_norm.weight.copy_(layer.qk_norm[0])
                attention.k_norm.weight.copy_(layer.qk_norm[spec.heads])
