"""Order files: written, read, taken by engine and pack, refused when they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine.conftest import engines
from morph_runtime.config import EngineConfig
from morph_runtime.engine.opening import OpenModel, open_checkpoint, open_pack
from morph_runtime.errors import ConfigError
from morph_runtime.pack.__main__ import main as pack_main
from morph_runtime.profile.order_file import (
    OrderFile,
    RungOrder,
    Score,
    TextEntry,
    fingerprint,
    read_order_file,
    write_order_file,
)
from weights.tiny_checkpoint import make_llama

if TYPE_CHECKING:
    from engine.conftest import EngineFactory

__all__ = ["engines"]


def open_with(folder: Path, order: str = "auto", ladder: tuple[str, ...] = ("w8", "w4"), **model: str) -> OpenModel:
    values = {"path": str(folder), "dtype": "float32", **model}
    config = EngineConfig.from_mapping({"model": values, "morph": {"ladder": list(ladder), "order": order}})
    return (open_pack if (folder / "pack.json").exists() else open_checkpoint)(config, folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of three layers."""
    make_llama(tmp_path / "m", num_hidden_layers=3)
    return tmp_path / "m"


@pytest.fixture
def order(source: Path, tmp_path: Path) -> Path:
    """Its order file; W8 and W4 differ."""
    orders = {"w8": [1, 0, 2], "w4": [2, 0, 1]}
    rungs = {r: RungOrder(o, [Score(i, 0.5, 0.9, 0.99, 0.8) for i in o]) for r, o in orders.items()}
    model = fingerprint(open_with(source).host_slots())
    text = TextEntry("books.txt", "0" * 64, 8, 512)
    found = OrderFile(1, "0", "2", "cpu", "float32", model, 3, False, [0.25, 0.25, 0.5], text, rungs)
    write_order_file(found, tmp_path / "order.json")
    assert read_order_file(tmp_path / "order.json") == found
    return tmp_path / "order.json"


def test_a_model_takes_the_order_of_the_ladders_deepest_rung(source: Path, order: Path) -> None:
    assert open_with(source, str(order)).plan.order == (2, 0, 1)
    assert open_with(source, str(order), ("w4",)).plan.order == (2, 0, 1)
    assert open_with(source, str(order), ("w8",)).plan.order == (1, 0, 2)
    assert open_with(source).plan.order == (0, 1, 2)  # the default without a profile


def test_the_engine_walks_down_in_that_order(source: Path, order: Path, engines: EngineFactory) -> None:
    engine = engines(source, memory={"kv_tokens": 256}, morph={"ladder": ["w8", "w4"], "order": str(order)})
    seen = []
    for level in (1, 2, 4, 6):
        engine.set_level(level)
        seen.append(tuple(engine.parts.swapper.rungs))
    assert seen == [("full", "full", "w8"), ("w8", "full", "w8"), ("w8", "w8", "w4"), ("w4", "w4", "w4")]


def test_a_pack_keeps_the_order_and_takes_another_one(source: Path, order: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    assert pack_main([str(source), "--out", str(out), "--dtype", "float32", "--order", str(order)]) == 0
    assert json.loads((out / "pack.json").read_text())["order"] == [2, 0, 1]
    assert open_with(out).plan.order == (2, 0, 1)
    assert open_with(out, "front_to_back").plan.order == (0, 1, 2)
    # The file is known to be of this model by the pack's bytes too.
    assert open_with(out, str(order), ("w8",)).plan.order == (1, 0, 2)


def test_a_model_is_known_whatever_type_it_is_served_in(source: Path, order: Path) -> None:
    assert open_with(source, str(order), dtype="bfloat16").plan.order == (2, 0, 1)


def test_an_order_of_another_model_is_refused(order: Path, tmp_path: Path) -> None:
    make_llama(tmp_path / "other", num_hidden_layers=3, seed=1)
    make_llama(tmp_path / "deeper", num_hidden_layers=4)
    for name in ("other", "deeper"):
        with pytest.raises(ConfigError, match=r"morph\.order: .*order\.json was made for another model"):
            open_with(tmp_path / name, str(order))


def test_an_order_without_the_rung_is_refused(source: Path, order: Path) -> None:
    values = json.loads(order.read_text())
    del values["rungs"]["w4"]
    order.write_text(json.dumps(values))
    assert open_with(source, str(order), ("w8",)).plan.order == (1, 0, 2)
    with pytest.raises(ConfigError, match=r"no order for w4, .* only for: w8; make one .* --rung w4"):
        open_with(source, str(order))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v.update(format=2), "is not an order file of format 1"),
        (lambda v: v.pop("rungs"), "is not an order file: .*rungs"),
        (lambda v: v.update(extra=1), "is not an order file: .*extra"),
        (lambda v: v["rungs"]["w8"].update(order=[0, 0, 1]), "the order for w8 must name each of the layers 0 to 2"),
        (lambda v: v["rungs"]["w4"].update(order=["0"]), "is not an order file: Expected `int`"),
        (lambda v: v.update(model="x"), "is not an order file: .*model"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(
    source: Path, order: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    values = json.loads(order.read_text())
    change(values)
    order.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message) as caught:
        open_with(source, str(order))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data, message", [(None, "No such file"), (b"[]", "object"), (b"{", "JSON")])
def test_what_is_no_order_file_is_named(source: Path, tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "x.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        open_with(source, str(path))
    assert str(path) in str(caught.value)
