"""Small seeded models on disk, and engines on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import SamplingParams, Submit

EngineFactory = Callable[..., Engine]


def make_model(
    folder: Path, *, kv_heads: int, seed: int = 0, vocab: int = 200, positions: int = 256, width: int = 1
) -> Path:
    """A Llama with random weights large enough that quantization shows in its logits; `width` makes it wider."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128 * width, intermediate_size=256 * width, num_hidden_layers=4, num_attention_heads=4 * width,
        num_key_value_heads=kv_heads, head_dim=32, vocab_size=vocab, max_position_embeddings=positions,
        tie_word_embeddings=True, initializer_range=0.15, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=[2, 4], ids=["gqa", "mha"])
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, once with grouped-query and once with multi-head attention."""
    return make_model(tmp_path_factory.mktemp("model"), kv_heads=request.param)


@pytest.fixture
def engines() -> Iterator[EngineFactory]:
    """Makes engines (float32, controller off, integrity checked after each step) and closes them."""
    made: list[Engine] = []

    def make(folder: Path, **sections: Any) -> Engine:
        settings: dict[str, Any] = {
            "model": {"path": str(folder), "dtype": "float32"},
            "memory": {"kv_tokens": 512, "block_tokens": 8, "extent_kib": 16},
            "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 48},
            "morph": {"mode": "off", "ladder": ["w4"], "costs": "off"},
            "kernels": {"threads": 1},
            "check_integrity": True,
        }
        for name, values in sections.items():
            settings[name] = {**settings.get(name, {}), **values} if isinstance(values, dict) else values
        engine = build_engine(EngineConfig.from_mapping(settings))
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def submit(engine: Engine, key: int, prompt: list[int], max_tokens: int, priority: int = 0, **params: Any) -> None:
    """A greedy request that runs to its token limit unless told otherwise."""
    sampling = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **params})
    engine.submit(Submit(key=key, prompt=prompt, sampling=sampling, priority=priority, arrival_s=float(key)))


def run_all(engine: Engine, between: Callable[[int], None] | None = None) -> dict[int, list[int]]:
    """Step until nothing is left; the tokens of each request by key."""
    tokens: dict[int, list[int]] = {}
    step = 0
    while engine.has_requests:
        if between:
            between(step)
        out = engine.step(decide=False)
        for delta in out.tokens if out else ():
            tokens.setdefault(delta.key, []).extend(delta.tokens)
        step += 1
        assert step < 5000, "the engine makes no progress"
    return tokens
