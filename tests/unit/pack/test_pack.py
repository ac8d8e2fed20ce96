"""Packs are complete or not there, say what they are, and are refused with a reason when they do not fit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.conftest import make_model
from morph_runtime import __version__
from morph_runtime.config import EngineConfig
from morph_runtime.engine.opening import open_checkpoint, open_pack
from morph_runtime.errors import ConfigError, IntegrityError
from morph_runtime.pack import make
from morph_runtime.pack.__main__ import main
from morph_runtime.pack.manifest import read_manifest
from morph_runtime.pack.reader import PackReader
from morph_runtime.weights.slots import LayerSlots
from weights.awq_packer import make_awq


def config(path: Path, **sections: dict[str, Any]) -> EngineConfig:
    values: dict[str, Any] = {"model": {"path": str(path), "dtype": "float32"}, "morph": {"ladder": ["w8", "w4"]}}
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return EngineConfig.from_mapping(values)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    folder = make_model(tmp_path_factory.mktemp("source"), kv_heads=4)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def original(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its pack; not to be changed."""
    out = tmp_path_factory.mktemp("packs") / "pack"
    make.make_pack(config(source), out)
    return out


@pytest.fixture
def pack(original: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(original, tmp_path / "pack"))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rewrite(pack: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((pack / "pack.json").read_text())
    change(values)
    (pack / "pack.json").write_text(json.dumps(values))


def refused(pack: Path, **sections: dict[str, Any]) -> str:
    """Why the start refuses a pack: one sentence."""
    with pytest.raises(ConfigError) as caught:
        open_pack(config(pack, **sections), pack)
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".")
    return said


def test_a_pack_holds_every_layer_at_a_page_and_digests_of_all_files(original: Path, source: Path) -> None:
    manifest = read_manifest(original)
    assert {path.name for path in original.iterdir()} == {*manifest.files, "pack.json"}
    assert {"layers.full", "layers.w8", "layers.w4", "static", "config.json", "tokenizer.json"} <= set(manifest.files)
    for name, entry in manifest.files.items():
        data = (original / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.nbytes, entry.sha256)
    assert set(manifest.source) == {"config.json", "model.safetensors"}
    assert all(entry.stride % 4096 == 0 for entry in manifest.rungs.values())
    assert (original / "layers.w4").stat().st_size == manifest.layers * manifest.rungs["w4"].stride


def test_the_same_model_packs_to_the_same_bytes(original: Path, source: Path, tmp_path: Path) -> None:
    make.make_pack(config(source), tmp_path / "again")
    for path in original.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_failure_leaves_nothing_behind(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = LayerSlots.fill

    def differing(slots: LayerSlots, layer: int, rung: Any, slot: Any, full: Any = None) -> None:
        fill(slots, layer, rung, slot, full)
        if layer == 2 and rung == "w4" and full is not None:
            slot[0] ^= 1

    monkeypatch.setattr(LayerSlots, "fill", differing)
    with pytest.raises(IntegrityError, match="Layer 2: w4 made from the checkpoint and made from the layer"):
        make.make_pack(config(source), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_changes_while_it_is_packed_is_refused(source: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(source, tmp_path / "model"))

    def meanwhile(words: str) -> None:
        if words == "packing layer 4 of 4":
            os.utime(model / "model.safetensors")

    with pytest.raises(ConfigError, match=r"model.safetensors has changed while it was packed"):
        make.make_pack(config(model), tmp_path / "out", meanwhile)
    assert list(tmp_path.iterdir()) == [model]


def test_a_full_disk_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(ConfigError, match=r"The pack takes \d+ MiB, but .* has 0 MiB free"):
        make.make_pack(config(source), tmp_path / "out")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"dtype": "bfloat16"}}, "packed for float32, but model.dtype asks for bfloat16"),
        ({"kernels": {"w8": "aten-int8pack"}}, "No w8 kernel can serve"),
        ({"model": {"awq_path": "somewhere"}}, "model.awq_path is set, but"),
        ({"model": {"pack_source": "/nowhere"}}, "was not made from /nowhere: config.json: No such file"),
    ],
)
def test_settings_that_a_pack_does_not_fit_are_named(pack: Path, sections: dict[str, Any], said: str) -> None:
    assert said in refused(pack, **sections)


def test_a_source_to_compare_with_needs_a_pack(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.pack_source is set, but .* is not a pack"):
        open_checkpoint(config(source, model={"pack_source": str(source)}), source)


def test_another_kernel_is_named_with_the_linear(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    make.make_pack(config(source, model={"dtype": "bfloat16"}, kernels={"w4": "nibble"}), out)
    said = refused(out, model={"dtype": "bfloat16"}, kernels={"w4": "aten-int4pack"})
    assert "packed for the w4 kernel 'nibble' of 'qkv', but here 'aten-int4pack' serves it: set kernels.w4" in said
    open_pack(config(out, model={"dtype": "bfloat16"}, kernels={"w4": "nibble"}), out)


def test_a_rung_that_was_not_packed_is_named(source: Path, tmp_path: Path) -> None:
    make.make_pack(config(source, morph={"ladder": ["w8"]}), tmp_path / "pack")
    assert "has no w4, which morph.ladder asks for: set morph.ladder to w8" in refused(tmp_path / "pack")


def test_a_stale_pack_is_refused_and_an_untouched_or_copied_source_is_not(
    pack: Path, source: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(source, tmp_path / "model"))
    os.utime(model / "model.safetensors")  # another time, the same bytes: they are read and found equal
    open_pack(config(pack, model={"pack_source": str(model)}), pack)
    flip(model / "model.safetensors")
    assert "is stale: " in refused(pack, model={"pack_source": str(model)})


def test_a_flipped_byte_is_found_by_verifying(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(pack), "--verify"]) == 0
    for name in ("layers.full", "layers.w8", "layers.w4", "static"):
        flip(pack / name, 100)
        open_pack(config(pack), pack)
        assert f"{name} is not the file that was packed" in refused(pack, model={"verify_pack": True})
        assert main([str(pack), "--verify"]) == 2
        assert f"{name} is not the file that was packed" in capsys.readouterr().err
        flip(pack / name, 100)


def test_a_changed_small_file_is_found_at_every_start(pack: Path) -> None:
    flip(pack / "tokenizer.json", 0)
    assert "tokenizer.json is not the file that was packed" in refused(pack)


@pytest.mark.parametrize("name", ["layers.full", "layers.w4", "static", "config.json"])
def test_a_truncated_file_is_refused(pack: Path, name: str) -> None:
    size = (pack / name).stat().st_size
    os.truncate(pack / name, size - 1)
    assert f"{name} has {size - 1} bytes, but pack.json says {size}" in refused(pack)


def test_a_missing_file_or_one_that_is_no_file_is_refused(pack: Path) -> None:
    (pack / "layers.w8").unlink()
    assert "layers.w8 cannot be opened: No such file" in refused(pack)
    os.mkfifo(pack / "layers.w8")
    assert "layers.w8 is not a plain file" in refused(pack)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.update(format=2), "'format' is 2, but this version reads 1"),
        (lambda v: v.update(product="9.9"), f"'product' is '9.9', but this version reads '{__version__}'"),
        (lambda v: v.update(layers=10**9), "Expected `int` <= 4096"),
        (lambda v: v.update(order=[0, 0, 1, 2]), "'order' must name each of the layers 0 to 3 once"),
        (lambda v: v.update(ladder=["w4", "w8"]), "'ladder' must be"),
        (lambda v: v.update(surprise=1), "unknown field `surprise`"),
        (lambda v: v["files"].update({"../x": v["files"]["static"]}), "'files' names '../x', which no pack has"),
        (lambda v: v["files"].update({"/etc/passwd": v["files"]["static"]}), "which no pack has"),
        (lambda v: v["files"].pop("static"), "'files' lacks static"),
        (lambda v: v["rungs"].pop("w8"), "'rungs' must hold full and each rung"),
        (lambda v: v["rungs"]["w4"].update(stride=4096 * 9), "the stride of layers.w4 is 36864"),
        (lambda v: v["files"]["layers.w4"].update(nbytes=-1), "Expected `int` >= 0"),
        (lambda v: v["files"]["layers.w4"].update(nbytes=4096), "layers.w4 has 4096 bytes, not 4 slots"),
        (lambda v: v["files"]["static"].update(sha256="x"), "Expected `str` matching regex"),
        (lambda v: v["rungs"]["w4"].update(packing="0" * 64), "packed for another CPU or PyTorch"),
        (lambda v: v["rungs"]["w4"].update(layout="0" * 64), "has w4 slots of another layout"),
        (lambda v: v.update(static_layout="0" * 64), "has static weights of another layout"),
        (lambda v: v["source"].update({"config.json": v["source"]["model.safetensors"]}), "not that of its source"),
    ],
)
def test_a_hostile_or_foreign_manifest_is_one_sentence(pack: Path, change: Any, said: str) -> None:
    rewrite(pack, change)
    answer = refused(pack)
    assert said in answer and "make it again with 'morph pack'" in answer


def test_a_source_name_that_leads_elsewhere_is_not_followed(pack: Path, source: Path) -> None:
    rewrite(pack, lambda v: v["source"].update({"../x.safetensors": v["source"]["model.safetensors"]}))
    said = refused(pack, model={"pack_source": str(source)})
    assert "pack.json names the source file '../x.safetensors', which cannot be" in said


@given(data=st.binary(max_size=200))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_manifest_are_refused_with_a_sentence(pack: Path, data: bytes) -> None:
    (pack / "pack.json").write_bytes(data)
    with pytest.raises(ConfigError):
        PackReader(pack)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, " " * (5 * 2**20)])
def test_a_deep_or_huge_manifest_is_refused(pack: Path, text: str) -> None:
    (pack / "pack.json").write_text(text)
    assert "pack.json" in refused(pack)


def test_the_command_makes_a_pack_from_an_awq_checkpoint_too(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    awq, out = make_awq(source, tmp_path / "awq"), tmp_path / "pack"
    assert main([str(source), "--awq", str(awq), "--out", str(out), "--dtype", "float32", "--order", "3,2,1,0"]) == 0
    assert f"MORPH_MODEL={out}" in capsys.readouterr().out
    assert main([str(out), "--verify", "--source", str(source), "--awq", str(awq)]) == 0
    manifest = read_manifest(out)
    assert manifest.order == [3, 2, 1, 0] and manifest.awq is not None
    flip(awq / "model.safetensors")
    assert main([str(out), "--verify", "--awq", str(awq)]) == 2
    assert "is stale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{source}"], "--out is missing"),
        (["{tmp}", "--out", "{tmp}/o"], "is not a model folder: it has no config.json"),
        (["{pack}", "--out", "{tmp}/o"], "is a pack already"),
        (["{source}", "--out", "{source}"], "exists and is not an empty folder"),
        (["{source}", "--out", "{tmp}/no/o"], "the folder {tmp}/no does not exist"),
        (["{source}", "--out", "{tmp}/o", "--ladder", "w2"], "morph.ladder must be one of w8, w4"),
        (["{source}", "--out", "{tmp}/o", "--dtype", "float16"], "model.dtype must be one of auto, bfloat16, float32"),
        (["{source}", "--out", "{tmp}/o", "--order", "9"], "morph.order must be auto"),
        (["{source}", "--out", "{tmp}/o", "--kernel", "w4"], "--kernel must be full=NAME"),
        (["{source}", "--out", "{tmp}/o", "--kernel", "w4=x"], "names an unknown kernel 'x'"),
        (["{source}", "--out", "{tmp}/o", "--awq", "{source}"], "AWQ"),
        (["{source}", "--out", "{tmp}/o", "--source", "{source}"], "--source goes with --verify"),
        (["{source}", "--verify"], "is not a pack"),
        (["{pack}", "--verify", "--out", "{tmp}/o"], "--out does not go with --verify"),
    ],
)
def test_bad_input_to_the_command_is_one_sentence(
    source: Path, pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    places = {"source": source, "pack": pack, "tmp": tmp_path}
    assert main([text.format(**places) for text in arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("morph: ") and said.format(**places) in last
    assert not (tmp_path / "o").exists()
