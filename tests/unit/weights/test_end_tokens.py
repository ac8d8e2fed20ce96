"""Which tokens end an output: what config.json, generation_config.json and the tokenizer's files say together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from morph_runtime.errors import ConfigError
from morph_runtime.pack.manifest import COPIED
from morph_runtime.weights.spec import ModelSpec
from weights.test_spec import write

CHATML = {
    "added_tokens": [{"id": 11, "content": "<|endoftext|>"}, {"id": 13, "content": "<|im_end|>", "special": True}],
    "model": {"type": "BPE", "vocab": {"a": 0, "</s>": 2}, "merges": []},
}
UNIGRAM = {"added_tokens": [], "model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5], ["</s>", 0.0]]}}


def folder(path: Path, eos_token: Any, tokenizer: Any = CHATML, generation: Any = None, **changes: Any) -> Path:
    """A model folder with the files of a tokenizer."""
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return write(path, generation, **changes)


def test_a_chat_model_ends_at_its_tokenizers_end_of_turn_too(tmp_path: Path) -> None:
    """ChatML fine-tunes keep the base's configs and change the tokenizer alone."""
    path = folder(tmp_path, "<|im_end|>", generation={"eos_token_id": 11}, eos_token_id=11)
    assert ModelSpec.from_folder(path).eos_ids == (11, 13)


def test_a_pack_keeps_all_that_says_what_ends_an_output(tmp_path: Path) -> None:
    path, pack = folder(tmp_path, "<|im_end|>", generation={"eos_token_id": 11}, eos_token_id=7), tmp_path / "pack"
    pack.mkdir()
    for name in COPIED:
        if (path / name).is_file():
            (pack / name).write_bytes((path / name).read_bytes())
    assert ModelSpec.from_folder(pack).eos_ids == (7, 11, 13)


@pytest.mark.parametrize("config,generation,found", [
    (7, {"eos_token_id": [8, 7]}, (7, 8)),
    ([7, 9], {"eos_token_id": 8}, (7, 9, 8)),
    (7, {}, (7,)),
    (None, {"eos_token_id": 8}, (8,)),
    ([], {"eos_token_id": None}, ()),
])  # fmt: skip
def test_both_configs_count_and_no_token_twice(
    tmp_path: Path, config: Any, generation: Any, found: tuple[int, ...]
) -> None:
    assert ModelSpec.from_folder(write(tmp_path, generation, eos_token_id=config)).eos_ids == found


@pytest.mark.parametrize("eos_token,tokenizer,found", [
    ({"__type": "AddedToken", "content": "<|im_end|>"}, CHATML, (13,)),
    ("</s>", CHATML, (2,)),
    ("</s>", UNIGRAM, (2,)),
    ("<no such token>", CHATML, ()),
    (None, CHATML, ()),
    ("</s>", {}, ()),
])  # fmt: skip
def test_without_any_in_the_configs_the_tokenizers_counts(
    tmp_path: Path, eos_token: Any, tokenizer: Any, found: tuple[int, ...]
) -> None:
    assert ModelSpec.from_folder(folder(tmp_path, eos_token, tokenizer, eos_token_id="absent")).eos_ids == found


def test_a_tokenizer_config_without_a_tokenizer_adds_nothing(tmp_path: Path) -> None:
    path = folder(tmp_path, "</s>", eos_token_id=7)
    (path / "tokenizer.json").unlink()
    assert ModelSpec.from_folder(path).eos_ids == (7,)


def test_a_tokenizers_end_beyond_the_models_vocabulary_is_left_out(tmp_path: Path) -> None:
    """The model never says it, and the sampler has no column for it."""
    tokenizer = {"added_tokens": [{"id": 128256, "content": "<|im_end|>"}]}
    path = folder(tmp_path, "<|im_end|>", tokenizer, eos_token_id=7)
    assert ModelSpec.from_folder(path).eos_ids == (7,)


@pytest.mark.parametrize("eos_token,tokenizer,message", [
    (5, CHATML, r"tokenizer_config.json: 'eos_token' must be a string or an object with 'content', but is 5\."),
    (["</s>"], CHATML, r"tokenizer_config.json: 'eos_token' must be a string or an object"),
    ({"content": None}, CHATML, r"tokenizer_config.json: 'eos_token' must be a string or an object"),
    ("x", [], r"tokenizer.json must hold a JSON object"),
    ("x", {"added_tokens": [{"id": "1", "content": "x"}]}, r"tokenizer.json: the number of 'x' must .* holds '1'"),
    ("x", {"model": {"vocab": {"x": -1}}}, r"tokenizer.json: the number of 'x' must .* holds -1"),
    ("x", {"model": 3}, r"tokenizer.json: 'model' must be an object"),
])  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, eos_token: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec.from_folder(folder(tmp_path, eos_token, tokenizer))


@pytest.mark.parametrize("tokenizer", [
    {"added_tokens": 1}, {"added_tokens": [1, {}]}, {"model": {"vocab": "ab"}}, {"model": {"vocab": [1, [], ["b"]]}},
])  # fmt: skip
def test_a_tokenizer_of_another_form_adds_nothing(tmp_path: Path, tokenizer: Any) -> None:
    """Whether it is a tokenizer at all is found out, and said, where text is read."""
    assert ModelSpec.from_folder(folder(tmp_path, "a", tokenizer, eos_token_id=7)).eos_ids == (7,)
