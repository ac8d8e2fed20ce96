"""A checkpoint is data from somebody else: whatever is in it is read right, or refused with one sentence."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from morph_runtime.errors import ConfigError
from morph_runtime.weights.reader import CheckpointReader
from morph_runtime.weights.safetensors_file import SafetensorsFile
from morph_runtime.weights.spec import ModelSpec
from weights.test_spec import V4

NUMBERS = st.integers(-3, 40) | st.sampled_from([2**31, 2**47, 2**63, 2**64, 10**400]) | st.floats() | st.booleans()
JUNK = st.none() | NUMBERS | st.text(max_size=6) | st.lists(NUMBERS, max_size=3) | st.just("\ud800") | st.just("../x")
NAMES = st.text(max_size=5) | st.sampled_from(["a", "b", "__metadata__", "\ud800", "../../a", "\x00"])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F99", ""]) | JUNK,
        "shape": st.lists(NUMBERS, max_size=4) | JUNK | st.just([2**47] * 400),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JUNK,
    },
)
QUIET = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def one_sentence(error: ConfigError) -> None:
    str(error).encode("utf-8")
    assert len(str(error)) < 1500


@QUIET
@given(st.dictionaries(NAMES, ENTRIES | JUNK, max_size=3) | JUNK, st.binary(max_size=60), st.integers(-5, 5))
def test_any_header_is_read_within_the_file_or_refused(tmp_path: Path, header: Any, data: bytes, lie: int) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(text) + lie)) + text + data)
    try:
        file = SafetensorsFile(path)
    except ConfigError as error:
        one_sentence(error)
        return
    for info in file.tensors.values():
        assert info.offset + info.nbytes <= path.stat().st_size
        file.read(info.offset, torch.empty(info.nbytes, dtype=torch.uint8))
    file.close()


@QUIET
@given(st.data())
def test_a_damaged_file_gives_its_tensors_or_a_sentence(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    try:
        reader = CheckpointReader(tmp_path)
        for name in ("a", "b"):
            reader.read(name)
    except ConfigError as error:
        one_sentence(error)
    else:
        reader.close()


@QUIET
@given(st.dictionaries(NAMES, st.sampled_from(["s.safetensors", "../s.safetensors", "/etc/passwd", "s"]) | JUNK) | JUNK)
def test_any_index_stays_in_its_folder_or_is_refused(tmp_path: Path, weight_map: Any) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "s.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    try:
        reader = CheckpointReader(tmp_path)
    except ConfigError as error:
        one_sentence(error)
    else:
        assert all(path.parent == tmp_path for path in reader.paths)
        reader.close()


@QUIET
@given(
    st.dictionaries(
        st.sampled_from([*V4, "head_dim", "sliding_window", "rope_parameters"]), JUNK, min_size=1, max_size=3
    )
)
def test_any_configuration_is_a_model_or_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**V4, **changes}))
    try:
        spec = ModelSpec.from_folder(tmp_path)
    except ConfigError as error:
        one_sentence(error)
    else:
        assert spec.layers > 0 and spec.vocab > 0 and spec.head_dim > 0


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_a_number_with_more_digits_than_a_float_holds_is_refused(tmp_path: Path, value: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**V4, "rms_norm_eps": value}))
    with pytest.raises(ConfigError, match="'rms_norm_eps' must be a number above 0"):
        ModelSpec.from_folder(tmp_path)


def test_a_shape_whose_size_nobody_can_write_down_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2**47] * 400, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ConfigError, match="400 dimensions, more than 8"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_pipe_in_the_place_of_a_shard_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "s.safetensors"}}))
    with pytest.raises(ConfigError, match=r"s\.safetensors"):
        CheckpointReader(tmp_path)
