"""A pack serves what its checkpoint serves, bit for bit, and the start refuses a pack that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from engine.conftest import run_all, submit
from morph_runtime.config import EngineConfig
from morph_runtime.pack.make import make_pack
from weights.awq_packer import make_awq

if TYPE_CHECKING:
    from engine.conftest import EngineFactory
    from morph_runtime.engine.core import Engine


def packed(model: Path, out: Path, dtype: str = "float32", awq: Path | None = None, order: str = "auto") -> Path:
    settings: dict[str, Any] = {
        "model": {"path": str(model), "dtype": dtype, "awq_path": str(awq or "")},
        "morph": {"ladder": ["w8", "w4"], "order": order},
    }
    make_pack(EngineConfig.from_mapping(settings), out)
    return out


def logits_and_tokens(engine: Engine, level: int) -> tuple[list[torch.Tensor], dict[int, list[int]]]:
    """What mixed requests get at a level: every step's logits, and the tokens of each."""
    seen: list[torch.Tensor] = []
    forward = engine.parts.runner.decoder.forward

    def forwarded(batch, layers):  # type: ignore[no-untyped-def]
        seen.append(forward(batch, layers).clone())
        return seen[-1]

    engine.parts.runner.decoder.forward = forwarded  # type: ignore[method-assign]
    engine.set_level(level)
    assert engine.level == level
    for key in range(4):
        submit(engine, key, [1 + key] * (5 + 17 * key), 12)
    tokens = run_all(engine)
    engine.parts.runner.decoder.forward = forward  # type: ignore[method-assign]
    return seen, tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("awq", [False, True], ids=["rounded", "awq"])
def test_a_pack_gives_the_logits_of_its_checkpoint_at_every_rung(
    tiny_model: Path, engines: EngineFactory, tmp_path: Path, dtype: str, awq: bool
) -> None:
    quantized = make_awq(tiny_model, tmp_path / "awq") if awq else None
    pack = packed(tiny_model, tmp_path / "pack", dtype, quantized)
    ladder = {"ladder": ["w8", "w4"]}
    checkpoint = engines(tiny_model, model={"dtype": dtype, "awq_path": str(quantized or "")}, morph=ladder)
    served = engines(pack, model={"dtype": dtype, "verify_pack": True, "pack_source": str(tiny_model)}, morph=ladder)
    layers = checkpoint.parts.spec.layers
    for level in (0, layers, 2 * layers, 0):
        wanted, wanted_tokens = logits_and_tokens(checkpoint, level)
        found, found_tokens = logits_and_tokens(served, level)
        assert found_tokens == wanted_tokens
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_layer_order_of_a_pack_holds_until_the_settings_name_another(
    tiny_model: Path, engines: EngineFactory, tmp_path: Path
) -> None:
    pack = packed(tiny_model, tmp_path / "pack", order="2,0,3,1")
    engine = engines(pack)
    engine.set_level(1)
    assert engine.parts.swapper.rungs == ("full", "full", "w4", "full")
    engine = engines(pack, morph={"order": "back_to_front"})
    engine.set_level(1)
    assert engine.parts.swapper.rungs == ("full", "full", "full", "w4")
