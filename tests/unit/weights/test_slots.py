from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import Rung
from morph_runtime.weights import slots as slots_module
from weights.tiny_checkpoint import aligned, make_llama, open_parts

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_slots_hold_the_checkpoint_byte_by_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_llama(tmp_path, dtype, shard="300KB", attention_bias=True, mlp_bias=True).to(dtype)
    parts = open_parts(tmp_path, dtype)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for number in range(2):
        layer, wanted = parts.layer(number, "full"), model.model.layers[number]
        attention, mlp = wanted.self_attn, wanted.mlp
        modules = [
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ]
        for linear, group in zip(layer.linears, modules, strict=True):
            assert torch.equal(linear.tensors["weight"], torch.cat([m.weight for m in group]))
            assert linear.bias is not None
            assert torch.equal(linear.bias, torch.cat([m.bias for m in group]))
        assert torch.equal(layer.input_norm, wanted.input_layernorm.weight)
        assert torch.equal(layer.post_norm, wanted.post_attention_layernorm.weight)
    assert torch.equal(parts.static.embedding, model.model.embed_tokens.weight)
    assert torch.equal(parts.static.final_norm, model.model.norm.weight)
    assert torch.equal(parts.static.lm_head, model.lm_head.weight)


@pytest.mark.parametrize("rung", ["w8", "w4"])
@pytest.mark.parametrize("stored,dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_quantized_slots_are_the_same_from_layer_and_from_checkpoint(
    tmp_path: Path, rung: Rung, stored: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_llama(tmp_path, stored, attention_bias=True)
    parts = open_parts(tmp_path, dtype)
    full = parts.layer(1, "full")
    one, other, chunked = (aligned(parts.slots.slot_bytes(rung)) for _ in range(3))
    other.fill_(0)
    parts.slots.fill(1, rung, one, full)
    parts.slots.fill(1, rung, other)
    monkeypatch.setattr(slots_module, "CHUNK_ELEMENTS", 64 * 128)
    parts.slots.fill(1, rung, chunked)
    assert torch.equal(one, other) and torch.equal(one, chunked)
    bound = parts.slots.bind(1, rung, one)
    assert torch.equal(bound.input_norm, full.input_norm) and torch.equal(bound.post_norm, full.post_norm)
    with pytest.raises(ValueError, match="layer 0 cannot be made from layer 1 at full"):
        parts.slots.fill(0, rung, one, full)


def test_fields_are_aligned_and_disjoint(tmp_path: Path) -> None:
    make_llama(tmp_path, attention_bias=True, hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    parts = open_parts(tmp_path, torch.bfloat16)
    sizes = []
    for rung in parts.slots.rungs:
        slot = aligned(parts.slots.slot_bytes(rung))
        layer = parts.slots.bind(0, rung, slot)
        tensors = [layer.input_norm, layer.post_norm]
        for linear in layer.linears:
            tensors += [*linear.tensors.values(), *([] if linear.bias is None else [linear.bias])]
        end = slot.data_ptr()
        for tensor in sorted(tensors, key=lambda t: t.data_ptr()):
            assert tensor.data_ptr() % 64 == 0 and tensor.data_ptr() >= end and tensor.is_contiguous()
            end = tensor.data_ptr() + tensor.nbytes
        assert end <= slot.data_ptr() + slot.nbytes
        sizes.append(slot.nbytes)
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < 0.3 * sizes[0]


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    make_llama(tmp_path / "tied", tie_word_embeddings=True)
    make_llama(tmp_path / "untied")
    tied, untied = open_parts(tmp_path / "tied"), open_parts(tmp_path / "untied")
    assert tied.static.lm_head.data_ptr() == tied.static.embedding.data_ptr()
    assert untied.static.lm_head.data_ptr() != untied.static.embedding.data_ptr()


def test_a_linear_that_w4_cannot_serve_is_named(tmp_path: Path) -> None:
    make_llama(tmp_path, intermediate_size=192)
    with pytest.raises(
        ConfigError, match=r"'down' \(128 x 192\).*192 inputs, which is not a multiple of the group 128"
    ):
        open_parts(tmp_path)
    parts = open_parts(tmp_path, rungs=["full", "w8"])
    assert parts.slots.rungs == ("full", "w8")


def test_a_forced_kernel_is_taken_for_all_linears(tmp_path: Path) -> None:
    make_llama(tmp_path)
    parts = open_parts(tmp_path, torch.bfloat16, forced={"w4": "nibble", "w8": ""})
    assert set(parts.slots.kernel_names("w4").values()) == {"nibble"}
    with pytest.raises(ConfigError, match=r"kernels.w8 names an unknown kernel 'x'"):
        open_parts(tmp_path, torch.bfloat16, forced={"w8": "x"})


def test_a_checkpoint_that_does_not_fit_the_config_is_refused_at_start(tmp_path: Path) -> None:
    make_llama(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"intermediate_size": 256', '"intermediate_size": 384'))
    with pytest.raises(ConfigError, match=r"'model.layers.0.mlp.gate_proj.weight' has the shape \[256, 128\]"):
        open_parts(tmp_path)
    config.write_text(text.replace('"attention_bias": false', '"attention_bias": true'))
    with pytest.raises(ConfigError, match=r"no tensor 'model.layers.0.self_attn.q_proj.bias'"):
        open_parts(tmp_path)
    config.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ConfigError, match=r"no tensor 'model.layers.2.input_layernorm.weight'"):
        open_parts(tmp_path)


def test_a_bias_that_the_config_does_not_know_is_refused(tmp_path: Path) -> None:
    make_llama(tmp_path, attention_bias=True)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"attention_bias": true', '"attention_bias": false'))
    with pytest.raises(ConfigError, match=r"has a bias 'model.layers.0.self_attn.q_proj.bias', but config.json says"):
        open_parts(tmp_path)


def test_a_worker_may_fill_while_another_thread_computes(tmp_path: Path) -> None:
    make_llama(tmp_path, torch.bfloat16)
    parts = open_parts(tmp_path, torch.bfloat16)
    layer, scratch = parts.layer(0, "w4"), parts.scratch()
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted_y, wanted_slot = layer.gate_up.run(x, scratch).clone(), aligned(parts.slots.slot_bytes("w4"))
    parts.slots.fill(1, "w4", wanted_slot)
    slot = aligned(parts.slots.slot_bytes("w4"))
    faults: list[str] = []

    def work() -> None:
        for _ in range(30):
            slot.zero_()
            parts.slots.fill(1, "w4", slot)
            if not torch.equal(slot, wanted_slot):
                faults.append("slot")

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        if not torch.equal(layer.gate_up.run(x, scratch), wanted_y):
            faults.append("product")
    thread.join()
    assert not faults


def test_staging_is_bounded(tmp_path: Path) -> None:
    make_llama(tmp_path)
    parts = open_parts(tmp_path)
    assert 0 < parts.slots.staging_bytes < 16 * 2**20
    assert parts.slots.scratch_bytes >= 2 * 256 * 128 * 5
