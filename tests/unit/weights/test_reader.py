from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from morph_runtime.errors import ConfigError
from morph_runtime.weights.reader import CheckpointReader
from morph_runtime.weights.safetensors_file import SafetensorsFile


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_tensors_come_back_converted(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensors = {"a": torch.randn(700, 513).to(stored), "b": torch.randn(5).to(stored)}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    for name, tensor in tensors.items():
        found = torch.empty(tensor.shape, dtype=wanted)
        reader.read_into(name, found)
        assert torch.equal(found, tensor.to(wanted))
        rows = torch.empty(2, *tensor.shape[1:], dtype=wanted)
        reader.read_into(name, rows, 3)
        assert torch.equal(rows, tensor[3:5].to(wanted))
    assert "a" in reader and "c" not in reader
    reader.close()


def test_shards_follow_the_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(3, i + 1) for i in range(4)}
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(tensors)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    reader = CheckpointReader(tmp_path)
    for name, tensor in tensors.items():
        found = torch.empty(tensor.shape)
        reader.read_into(name, found)
        assert torch.equal(found, tensor)


def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 6), "n": torch.zeros(3, dtype=torch.int64)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    reader.check("a", (4, 6))
    with pytest.raises(ConfigError, match=r"tensor 'a' has the shape \[4, 6\], but config.json needs \[6, 4\]"):
        reader.check("a", (6, 4))
    with pytest.raises(ConfigError, match=r"tensor 'n' has the type torch.int64, not a floating-point one"):
        reader.check("n", (3,))
    with pytest.raises(ConfigError, match="the checkpoint has no tensor 'z'"):
        reader.read_into("z", torch.empty(1))
    with pytest.raises(ConfigError, match=r"tensor 'a' has the shape \[4, 6\]: rows 3 to 5 of the shape \[6\] cannot"):
        reader.read_into("a", torch.empty(2, 6), 3)
    with pytest.raises(ConfigError, match=r"rows 0 to 4 of the shape \[5\]"):
        reader.read_into("a", torch.empty(4, 5))


BAD_HEADERS: list[tuple[Any, bytes, str]] = [
    (b"{", b"", "damaged header"),
    (b"[]", b"", "no JSON object"),
    (b'{"a": 1, "a": 2}', b"", "a name occurs twice"),
    (b"[" * 200_000, b"", "damaged header"),
    ({"a": 7}, b"", "tensor 'a' is no object"),
    ({"a": entry([1], 0, 4, "F8_E4M3")}, b"1234", "unknown type 'F8_E4M3'"),
    ({"a": {**entry([1], 0, 4), "dtype": ["F32"]}}, b"1234", "unknown type"),
    ({"a": entry([-1], 0, 4)}, b"1234", r"bad shape \[-1\]"),
    ({"a": {**entry([1], 0, 4), "shape": "1"}}, b"1234", "bad shape '1'"),
    ({"a": {**entry([1], 0, 4), "data_offsets": [0]}}, b"1234", r"bad offsets \[0\]"),
    ({"a": entry([1], 4, 0)}, b"1234", "has -4 bytes where its shape and type need 4"),
    ({"a": entry([2], 0, 4)}, b"1234", "has 4 bytes where its shape and type need 8"),
    ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"12345678", "'b' overlaps 'a'"),
    ({"a": entry([2], 0, 8)}, b"1234567", r"cut short: tensor 'a' ends at byte \d+"),
]


@pytest.mark.parametrize("header,data,message", BAD_HEADERS)
def test_a_bad_header_names_the_file(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ConfigError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "cut short: it has 0 bytes and no header"),
        (b"1234567", "cut short"),
        (struct.pack("<Q", 100) + b"{}", "cut short: its header takes 100 bytes, the file has 10"),
        (struct.pack("<Q", 2**63) + b"{}", "no safetensors file: its header would take"),
    ],
)
def test_a_cut_header_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        CheckpointReader(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300))
def test_no_bytes_make_it_crash(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", min(len(data), 64)) + data)
    with contextlib.suppress(ConfigError):
        SafetensorsFile(path).close()


def test_a_file_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    reader = CheckpointReader(tmp_path)
    with path.open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ConfigError, match=r"model.safetensors ends at byte 200, before the data"):
        reader.read_into("a", torch.empty(1000))


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        CheckpointReader(tmp_path)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    "index,message",
    [
        ({}, "'weight_map' must be an object"),
        ({"weight_map": {"a": "../other.safetensors"}}, "'../other.safetensors' is not the name of a safetensors file"),
        ({"weight_map": {"a": 3}}, "3 is not the name"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors cannot be opened: No such file"),
        ({"weight_map": {"b": "model-1.safetensors"}}, "the shard model-1.safetensors has no tensor 'b'"),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, index: Any, message: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message):
        CheckpointReader(tmp_path)
