"""Changes to a model folder: drawn at random, written down as JSON, done again from a corpus."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.messages import SamplingParams, Submit
from morph_runtime.errors import ConfigError
from morph_runtime.text.tokenizer import Tokenizer

Change = dict[str, Any]
"""`file`, and one of: `at` (a path into its JSON, or into the header of a safetensors file) with a `value` or with
`drop`; `cut` (bytes that stay); `flip` (place and mask of a byte); `text` (the whole content, so many `times`)."""

NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 5, 7, 128, 2**31 - 1, 2**31, 2**40, 2**63, 10**30, 0.0, 0.5, -0.5, 1e-300, 1e300]
)
WORDS = st.sampled_from(
    ["", "x", "../x", "bfloat16", "\x00", "\ud800", "LlamaForCausalLM", "nan", "F32", "I64", "gemv"]
)
JUNK = st.none() | st.booleans() | NUMBERS | WORDS | st.just(float("nan")) | st.just([]) | st.just({}) | st.just([[]])


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path into a JSON value but the empty one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, below in inner:
        yield (*at, key)
        yield from places(below, (*at, key))


def changes(folder: Path) -> st.SearchStrategy[list[Change]]:
    """One to three changes to a folder."""
    kinds = []
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        kinds.append(st.fixed_dictionaries({"file": st.just(path.name), "cut": st.integers(0, size - 1)}))
        flip = st.tuples(st.integers(0, min(size, 4096) - 1), st.integers(1, 255)).map(list)
        kinds.append(st.fixed_dictionaries({"file": st.just(path.name), "flip": flip}))
        if (known := _parsed(path)) is not None:
            at = st.sampled_from(list(places(known))).map(list)
            value = at.flatmap(lambda at, known=known: _near(_get(known, at)))
            kinds += [
                st.fixed_dictionaries({"file": st.just(path.name), "at": at, "value": JUNK | value}),
                st.fixed_dictionaries({"file": st.just(path.name), "at": at, "drop": st.just(True)}),
            ]
    return st.lists(st.one_of(kinds), min_size=1, max_size=3)


def apply(folder: Path, change: Change) -> None:
    """Do it; a path that an earlier change has removed is passed over."""
    path = folder / change["file"]
    content = path.read_bytes()
    if "at" in change:
        value = copy.deepcopy(_parsed(path))
        *way, last = change["at"]
        try:
            inner = _get(value, way)
            if change.get("drop"):
                del inner[last]
            else:
                inner[last] = change["value"]
        except (LookupError, TypeError):
            return
        text = json.dumps(value).encode()
        content = text if path.suffix == ".json" else struct.pack("<Q", len(text)) + text + _behind_header(content)
    elif "cut" in change:
        content = content[: change["cut"]]
    elif "flip" in change and change["flip"][0] < len(content):
        place, mask = change["flip"]
        content = content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]
    elif "text" in change:
        content = change["text"].encode() * change.get("times", 1)
    path.write_bytes(content)


def start(folder: Path, awq: Path | None = None) -> str:
    """Start an engine with a folder and let it say two tokens; why the folder is refused, empty if it is not.

    Anything but a `ConfigError` is a failure of the test.
    """
    values = {
        "model": {"path": str(folder), "dtype": "float32", **({"awq_path": str(awq)} if awq else {})},
        "memory": {"kv_tokens": 64, "block_tokens": 8, "extent_kib": 16},
        "scheduler": {"max_num_seqs": 2, "max_num_batched_tokens": 16},
        "morph": {"mode": "off", "ladder": ["w4"]},
        "kernels": {"threads": 1},
    }
    try:
        Tokenizer.from_folder(folder)
        engine = build_engine(EngineConfig.from_mapping(values))
    except ConfigError as error:
        said = str(error)
        said.encode()
        assert said and len(said) < 1500, said
        return said
    try:
        if engine.parts.max_model_len >= 6:
            sampling = SamplingParams(max_tokens=2, min_tokens=1, temperature=0.7, top_p=0.9, logprobs=3, seed=1)
            engine.submit(Submit(1, [1, 2, 3], sampling))
            for _ in range(10):
                engine.step(decide=False)
            assert not engine.has_requests
        engine.set_level(1)
        engine.check_integrity()
    finally:
        engine.close()
    return ""


def _parsed(path: Path) -> Any:
    """The JSON of a file, or of the header of a safetensors file; None if it is neither, or broken."""
    try:
        if path.suffix == ".safetensors":
            content = path.read_bytes()
            return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        return json.loads(path.read_bytes()) if path.suffix == ".json" else None
    except (ValueError, struct.error):
        return None


def _behind_header(content: bytes) -> bytes:
    return content[8 + struct.unpack("<Q", content[:8])[0] :]


def _get(value: Any, at: Any) -> Any:
    for key in at:
        value = value[key]
    return value


def _near(value: Any) -> st.SearchStrategy[Any]:
    """What is nearly right."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return st.sampled_from([value, [value], str(value)])
    return st.sampled_from([value + 1, value - 1, value * 2, value // 2, -value, str(value), [value], float(value)])
