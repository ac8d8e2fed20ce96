"""Start-up and shift time of the engine with and without a pack, on CPU.

    python bench/pack/start_and_shift.py [--model FOLDER] [--layers N] [--rounds N] [--threads N] [--json FILE]

Without --model a random Llama of 16 layers is made (hidden 1024, MLP 2816). Three ways to serve are compared in turn,
round by round, in one process: the checkpoint as saved in bfloat16, the same saved in float32 (which must be
converted), and a pack. Files are in the page cache, as after a first start. A shift is one layer: map the slot, fill
it, flip, unmap.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.pack.make import make_pack

LADDERS = (["w8", "w4"], ["w4"])


def random_model(folder: Path, layers: int, dtype: torch.dtype) -> Path:
    """Save a random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=8192, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def settings(folder: Path, threads: int, ladder: list[str]) -> EngineConfig:
    """What every way is served with."""
    return EngineConfig.from_mapping(
        {
            "model": {"path": str(folder)},
            "memory": {"kv_tokens": 2048},
            "morph": {"mode": "off", "ladder": ladder},
            "kernels": {"threads": threads},
        }
    )


def measure(config: EngineConfig) -> dict[str, float]:
    """Seconds to build the engine, and milliseconds per layer of each shift, all the way down and up."""
    began = time.perf_counter()
    engine = build_engine(config)
    figures = {"start_s": time.perf_counter() - began}
    layers, swapper = engine.parts.spec.layers, engine.parts.swapper
    for depth in (*range(1, len(config.morph.ladder) + 1), *reversed(range(len(config.morph.ladder)))):
        source, began = swapper.rungs[0], time.perf_counter()
        engine.set_level(depth * layers)
        taken = time.perf_counter() - began
        assert engine.level == depth * layers
        figures[f"{source} to {swapper.rungs[0]}, ms per layer"] = taken * 1e3 / layers
    engine.close()
    return figures


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        if options.model:
            ways = {"checkpoint": Path(options.model)}
        else:
            ways = {
                "checkpoint, bfloat16": random_model(temporary / "bf16", options.layers, torch.bfloat16),
                "checkpoint, float32": random_model(temporary / "fp32", options.layers, torch.float32),
            }
        torch.set_num_threads(options.threads)
        began = time.perf_counter()
        manifest = make_pack(settings(next(iter(ways.values())), options.threads, LADDERS[0]), temporary / "pack")
        packing_s = time.perf_counter() - began
        ways["pack"] = temporary / "pack"
        rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(options.rounds + 1):
            for way, folder in ways.items():
                figures = [measure(settings(folder, options.threads, ladder)) for ladder in LADDERS]
                rounds[way].append(figures[1] | figures[0])
    # The first round warms the page cache. Medians, with the least and the most.
    spread: dict[str, Any] = {
        way: {
            key: [round(f([figures[key] for figures in taken[1:]]), 3) for f in (statistics.median, min, max)]
            for key in taken[0]
        }
        for way, taken in rounds.items()
    }
    result = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "torch": str(torch.__version__),
        "threads": options.threads,
        "rounds": options.rounds,
        "layers": manifest.layers,
        "slot_mib": {rung: round(entry.slot_bytes / 2**20, 2) for rung, entry in manifest.rungs.items()},
        "pack_mib": round(sum(entry.nbytes for entry in manifest.files.values()) / 2**20, 1),
        "packing_s": round(packing_s, 1),
        "median_least_most": spread,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
