"""Makes AWQ checkpoints as AutoAWQ does, with drawn scales in place of searched ones: no AutoAWQ is needed.

What AutoAWQ moves where: `awq/quantize/scale.py`; how it packs: `awq/modules/linear/gemm.py` (0.2.9).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 128
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
QUANTIZATION = {
    "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True,
    "modules_to_not_convert": None,
}  # fmt: skip


def make_awq(model: Path, out: Path, *, seed: int = 0, **quantization: Any) -> Path:
    """The AWQ checkpoint of an unquantized one (one safetensors file) under `out`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    config = json.loads((model / "config.json").read_text())
    for layer in range(config["num_hidden_layers"]):
        _move_scales(tensors, f"model.layers.{layer}.", generator)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            stored |= pack(name.removesuffix("weight"), tensor)
        else:
            stored[name] = tensor.half()
    out.mkdir(parents=True, exist_ok=True)
    save_file(stored, out / "model.safetensors")
    config["quantization_config"] = {**QUANTIZATION, **quantization}
    (out / "config.json").write_text(json.dumps(config))
    return out


def _move_scales(tensors: dict[str, Tensor], prefix: str, generator: torch.Generator) -> None:
    def weight(name: str) -> Tensor:
        return tensors[f"{prefix}{name}.weight"]

    def drawn(size: int, spread: float) -> Tensor:
        return torch.exp(torch.randn(size, generator=generator) * spread)

    def after_norm(norm: str, modules: list[str]) -> None:
        scale = drawn(weight(norm).shape[0], 0.1)
        weight(norm).div_(scale)
        for module in modules:
            weight(module).mul_(scale)

    def between(first: str, second: str, spread: float) -> None:
        scale = drawn(weight(first).shape[0], spread)
        weight(first).div_(scale[:, None])
        bias = tensors.get(f"{prefix}{first}.bias")
        if bias is not None:
            bias.div_(scale)
        weight(second).mul_(scale)

    after_norm("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
    if weight("self_attn.v_proj").shape == weight("self_attn.o_proj").shape:
        between("self_attn.v_proj", "self_attn.o_proj", spread=0.5)
    after_norm("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"])
    between("mlp.up_proj", "mlp.down_proj", spread=0.1)


def pack(prefix: str, weight: Tensor) -> dict[str, Tensor]:
    """qweight, qzeros and scales of a weight [out, in]; their names begin with `prefix`."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // GROUP, GROUP)
    low, high = groups.aminmax(dim=2)
    scales = ((high - low).clamp(min=1e-5) / 15).half()
    zeros = (-(low / scales.float()).round()).clamp(0, 15)
    codes = (groups / scales.float()[:, :, None]).round().add(zeros[:, :, None]).clamp(0, 15)
    return {
        f"{prefix}qweight": words(codes.view(rows, columns).t()),
        f"{prefix}qzeros": words(zeros.t()),
        f"{prefix}scales": scales.t().contiguous(),
    }


def words(codes: Tensor) -> Tensor:
    """Codes [R, N] as int32 [R, N / 8]."""
    eight = codes.reshape(codes.shape[0], -1, 8).to(torch.int64)
    packed = sum(eight[:, :, output] << (4 * place) for place, output in enumerate(ORDER))
    assert isinstance(packed, Tensor)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous()
