from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from morph_runtime.errors import ConfigError
from morph_runtime.weights import awq_fill
from morph_runtime.weights.awq import PackedModule
from weights.awq_packer import make_awq, words
from weights.tiny_checkpoint import make_llama, open_parts

FIXTURE = Path(__file__).parent / "fixtures" / "awq_gemm.safetensors"
"""16 outputs of layer 3's q_proj of the demo model as AutoAWQ 0.2.9 has quantized it, and as it reads it back.

Made in AutoAWQ's environment (client/morph_client/awq), with `t` the tensors of an AWQ checkpoint:
    n = "model.layers.3.self_attn.q_proj."
    q, z, s = t[n + "qweight"][:, :2], t[n + "qzeros"][:, :2], t[n + "scales"][:, :16]
    d = awq.utils.packing_utils.dequantize_gemm(q, z, s, 4, 128)
    save_file({"qweight": q, "qzeros": z, "scales": s, "dequantized": d}, ...), each made contiguous.
"""


def test_unpacking_equals_autoawqs_own() -> None:
    recorded = load_file(FIXTURE)
    module = PackedModule(recorded["qweight"], recorded["qzeros"], recorded["scales"])
    values = module.rows(0, 16).dequantize()
    assert torch.equal(values.half(), recorded["dequantized"].t())
    assert torch.equal(module.rows(8, 16).dequantize(), values[8:])


def test_the_packer_of_these_tests_packs_as_autoawq_does() -> None:
    """So what it makes stands for AutoAWQ's checkpoints."""
    recorded = load_file(FIXTURE)
    rows = PackedModule(recorded["qweight"], recorded["qzeros"], recorded["scales"]).rows(0, 16)
    assert torch.equal(words(rows.codes.t()), recorded["qweight"])
    assert torch.equal(words(rows.zero_points), recorded["qzeros"])


@pytest.mark.parametrize("dtype,forced", [(torch.float32, ""), (torch.bfloat16, "nibble"), (torch.bfloat16, "")])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_slots_hold_the_checkpoints_values(tmp_path: Path, dtype: torch.dtype, forced: str, kv_heads: int) -> None:
    make_llama(tmp_path / "m", dtype, num_key_value_heads=kv_heads, attention_bias=True, intermediate_size=384)
    awq = make_awq(tmp_path / "m", tmp_path / "awq")
    parts = open_parts(tmp_path / "m", dtype, forced={"w4": forced}, awq=awq)
    if dtype == torch.bfloat16 and forced:
        assert set(parts.slots.kernel_names("w4").values()) == {forced}
    stored = load_file(awq / "model.safetensors")
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    for number in range(2):
        layer = parts.layer(number, "w4")
        prefix = f"model.layers.{number}."

        def values(*modules: str, prefix: str = prefix) -> torch.Tensor:
            read = []
            for module in modules:
                name = prefix + module
                packed = PackedModule(*(stored[f"{name}.{what}"] for what in ("qweight", "qzeros", "scales")))
                read.append(packed.rows(0, packed.scales.shape[1]).dequantize())
            return torch.cat(read)

        scale = torch.ones(128) if layer.o.input_scale is None else layer.o.input_scale.float()
        assert (layer.o.input_scale is None) == (kv_heads == 2)
        qkv = values("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        if kv_heads == 4:
            qkv[256:] /= scale[:, None]
        expected = {
            "qkv": qkv,
            "o": values("self_attn.o_proj") * scale,
            "gate_up": values("mlp.gate_proj", "mlp.up_proj"),
            "down": values("mlp.down_proj"),
        }
        for linear in layer.linears:
            wanted = expected[linear.shape.name]
            error = (linear.dequantize() - wanted).abs().max() / wanted.abs().max()
            assert error < tolerance, linear.shape.name
        bias = torch.cat([stored[f"{prefix}self_attn.{name}_proj.bias"] for name in "qkv"]).float()
        if kv_heads == 4:
            bias[256:] /= scale
        assert layer.qkv.bias is not None and layer.o.bias is not None
        torch.testing.assert_close(layer.qkv.bias.float(), bias, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(layer.o.bias, stored[f"{prefix}self_attn.o_proj.bias"].to(dtype))
        torch.testing.assert_close(layer.input_norm, stored[f"{prefix}input_layernorm.weight"].to(dtype))
        torch.testing.assert_close(layer.post_norm, stored[f"{prefix}post_attention_layernorm.weight"].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_is_the_same_from_layer_and_from_checkpoint_in_any_chunking(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_llama(tmp_path / "m", num_key_value_heads=4, attention_bias=True)
    parts = open_parts(tmp_path / "m", dtype, awq=make_awq(tmp_path / "m", tmp_path / "awq"))
    whole = parts.slot_bytes(1, "w4", parts.layer(1, "full"))
    assert torch.equal(whole, parts.slot_bytes(1, "w4"))
    monkeypatch.setattr("morph_runtime.weights.slots.CHUNK_ELEMENTS", 64 * 128)
    assert torch.equal(whole, parts.slot_bytes(1, "w4"))


def test_v_of_a_multi_head_model_is_that_of_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy: without it, V of the W4 layer is off by AWQ's scale of each channel."""
    make_llama(tmp_path / "m", num_key_value_heads=4, attention_bias=True)
    awq = make_awq(tmp_path / "m", tmp_path / "awq")
    x = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))

    def factors() -> torch.Tensor:
        """By how much each channel of V is larger than at full precision."""
        parts = open_parts(tmp_path / "m", awq=awq)
        full, quantized = parts.layer(0, "full"), parts.layer(0, "w4")
        v, v4 = (layer.qkv.run(x * layer.input_norm, parts.scratch())[:, 256:] for layer in (full, quantized))
        return (v * v4).sum(0) / v.square().sum(0)

    assert (factors() - 1).abs().max() < 0.05
    monkeypatch.setattr(awq_fill, "recover_v_scale", lambda q, f, n, m: (torch.ones(len(q)), torch.ones(len(q))))
    assert (factors() - 1).abs().max() > 0.5


def test_a_scale_that_cannot_be_told_is_one() -> None:
    full = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    quantized = torch.tensor([[0.1, 0.1], [2.0, 2.0], [-1.0, 0.0]])
    factors, cosines = awq_fill.recover_v_scale(quantized, full, torch.ones(2), torch.ones(2))
    assert factors.tolist() == [1.0, 2.0, 1.0]
    assert cosines.tolist() == pytest.approx([1.0, 1.0, -1.0])


def with_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(awq: Path) -> None:
        path = awq / "config.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return spoil


def quantization(**values: Any) -> Callable[[Path], None]:
    return with_config(lambda config: config["quantization_config"].update(values))


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(awq: Path) -> None:
        tensors = load_file(awq / "model.safetensors")
        change(tensors)
        save_file(tensors, awq / "model.safetensors")

    return spoil


Q = "model.layers.1.self_attn.q_proj"
BAD: list[tuple[Callable[[Path], Any], str]] = [
    (
        quantization(quant_method="gptq"),
        r"the quantization method 'gptq' is not read, only 'awq' is: make one",
    ),
    (quantization(quant_method="bitsandbytes"), r"the quantization method 'bitsandbytes' is not read"),
    (quantization(quant_method="compressed-tensors"), r"the quantization method 'compressed-tensors' is not read"),
    (quantization(version="gemv"), r"the AWQ layout 'gemv' is not read, only 'gemm' is"),
    (quantization(bits=8), r"AWQ with 8 bits is not read, only with 4"),
    (quantization(group_size=64), r"AWQ in groups of 64 is not read, only in groups of 128"),
    (quantization(group_size=-1), r"AWQ in groups of -1 is not read"),
    (quantization(zero_point=False), r"AWQ without zero points is not read"),
    (quantization(modules_to_not_convert=["o_proj"]), r"'modules_to_not_convert' leaves \['o_proj'\] unquantized"),
    (
        with_config(lambda c: c.pop("quantization_config")),
        r"an AWQ checkpoint, but this one is not quantized",
    ),
    (with_config(lambda c: c.update(num_hidden_layers=3)), r"of another model: its 'layers' is 3, but .* is 2"),
    (with_config(lambda c: c.update(rms_norm_eps=0.5)), r"of another model: its 'norm_eps' is 0.5"),
    (with_tensors(lambda t: t.pop(f"{Q}.qzeros")), r"no tensor 'model.layers.1.self_attn.q_proj.qzeros'"),
    (
        with_tensors(lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:64].clone()})),
        r"has the shape \[64,",
    ),
    (with_tensors(lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()})), r"torch.float32, not torch.int32"),
    (with_tensors(lambda t: t["model.norm.weight"].mul_(1.01)), r"another model: its 'model.norm.weight' differs"),
    (with_tensors(lambda t: t["model.embed_tokens.weight"].mul_(1.01)), r"its 'model.embed_tokens.weight' differs"),
    (lambda awq: (awq / "config.json").unlink(), r"model.awq_path names '.*', which is not a folder with a config"),
]


@pytest.mark.parametrize("spoil,message", BAD)
def test_an_unfit_checkpoint_is_refused_with_a_reason(
    tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    make_llama(tmp_path / "m")
    awq = make_awq(tmp_path / "m", tmp_path / "awq")
    spoil(awq)
    with pytest.raises(ConfigError, match=message):
        open_parts(tmp_path / "m", awq=awq)


def test_quantized_layers_of_another_model_are_refused(tmp_path: Path) -> None:
    """Even where the tensors that AWQ leaves alone are the same."""
    make_llama(tmp_path / "m")
    make_llama(tmp_path / "other", seed=1)
    awq = make_awq(tmp_path / "other", tmp_path / "awq")
    own = load_file(tmp_path / "m" / "model.safetensors")
    with_tensors(lambda t: t.update({n: own[n].half() for n in ("model.norm.weight", "model.embed_tokens.weight")}))(
        awq
    )
    with pytest.raises(ConfigError, match=r"another model: 'model.layers.\d.self_attn.v_proj' does not fit .*cosine"):
        open_parts(tmp_path / "m", awq=awq)


def test_staging_counts_what_a_fill_holds(tmp_path: Path) -> None:
    make_llama(tmp_path / "m")
    without = open_parts(tmp_path / "m").slots.staging_bytes
    parts = open_parts(tmp_path / "m", awq=make_awq(tmp_path / "m", tmp_path / "awq"))
    assert parts.slots.staging_bytes >= without + 2 * 256 * 128 // 2
