"""What a job serves: the engine's settings, a model repository that holds them, and prompts of exact lengths."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "backend"), str(ROOT / "client"), str(ROOT / "bench" / "engine")]

from random_model import SHAPES, word, write_folder  # noqa: E402 - found by the line above

from morph_client.prompts import PromptMaker, words_of  # noqa: E402
from morph_runtime.text.tokenizer import Tokenizer  # noqa: E402

LADDER = ("w8", "w4")
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "full": {"mode": "off", "costs": "off"},
    "w8": {"pin": "w8", "costs": "off"},
    "w4": {"pin": "w4", "costs": "off"},
    "accuracy": {"mode": "accuracy"},
    "balanced": {"mode": "balanced"},
    "performance": {"mode": "performance"},
}
"""Settings of the section `morph`, by the name of a variant: static rungs and the controller's modes."""
QUEUE = 4096
"""Requests that Triton's queue takes: none is refused, however long it gets."""


@dataclass(frozen=True)
class Target:
    """What is served, and with how much."""

    device: str
    model: str
    """A shape of `random_model`, with random weights, or a model folder."""
    budget_gib: float
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    depth: int = 0
    """Layers that may be changing at a time; 0: the engine's default."""

    @property
    def is_shape(self) -> bool:
        """Random weights."""
        return self.model in SHAPES

    def folder(self, room: Path) -> Path:
        """The model's folder; a shape's is made in `room`."""
        return write_folder(self.model, room / self.model) if self.is_shape else Path(self.model).resolve()

    def settings(self, folder: Path, morph: Mapping[str, Any]) -> dict[str, Any]:
        """The engine's settings, as `EngineConfig.from_mapping` takes them."""
        depth = {"depth": self.depth} if self.depth else {}
        return {
            "device": self.device,
            "model": {
                "path": str(folder), "dtype": "bfloat16", "max_model_len": self.max_model_len,
                "load_format": "dummy" if self.is_shape else "auto",
            },
            "memory": {"budget_gib": self.budget_gib},
            "cache": {"prefix": False},
            "scheduler": {
                "max_num_seqs": self.max_num_seqs, "max_num_batched_tokens": self.max_num_batched_tokens,
            },
            "morph": {"ladder": list(LADDER), **depth, **morph},
        }  # fmt: skip


def write_repository(room: Path, settings: Mapping[str, Any]) -> Path:
    """A copy of the model repository with these settings and a long queue."""
    repository = room / "repository"
    shutil.copytree(ROOT / "model_repository", repository, dirs_exist_ok=True)
    (repository / "morph" / "1" / "model.json").write_text(json.dumps(settings), encoding="utf-8")
    config = repository / "morph" / "config.pbtxt"
    text, found = re.subn(r"max_queue_size: \d+", f"max_queue_size: {QUEUE}", config.read_text(encoding="utf-8"))
    text, timed = re.subn(r"default_timeout_microseconds: \d+", "default_timeout_microseconds: 600000000", text)
    if found != 1 or timed != 1:
        raise SystemExit(f"{config} has no queue policy to change: max_queue_size, default_timeout_microseconds")
    config.write_text(text, encoding="utf-8")
    return repository


class Prompts:
    """Prompts as text for Triton and as tokens for the engine: the same ones."""

    def __init__(self, target: Target, folder: Path, seed: int) -> None:
        self._tokenizer = Tokenizer.from_folder(folder)
        if target.is_shape:
            # The lower tokens stay out: special ones, and what the prompt's number is unknown as.
            size = self._tokenizer.backend.get_vocab_size()
            words = [word(token) for token in range(min(1000, size // 2), size)]
            random.Random(seed).shuffle(words)
            ratio = 1.0
        else:
            words = words_of(None)
            ratio = len(self._tokenizer.encode(" ".join(words))) / len(words)
        self.maker = PromptMaker(words, ratio, seed)

    def tokens(self, count: int, index: int) -> list[int]:
        """About `count` tokens (exactly, of a shape) of prompt number `index`."""
        return self._tokenizer.encode(self.maker.make(count, index))
