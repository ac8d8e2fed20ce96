"""Time whole steps of the decoder on CPU, per rung: decodes of B sequences, and prefill chunks.

    python bench/kernels/decoder_cpu.py --model models/morph-demo --out bench/kernels/results/decoder_cpu.json

Without `--model`, random weights of the demo model's shape are used; speed does not depend on the values.
Rungs take turns within every round, so that other load on the machine meets them alike; the least and the
median of the rounds are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morph_runtime.kernels.rung import Rung
from morph_runtime.models.batch import SequenceSlice, StepBatch
from morph_runtime.models.decoder import Decoder
from morph_runtime.weights.bound import LayerWeights
from morph_runtime.weights.reader import CheckpointReader
from morph_runtime.weights.slots import LayerSlots
from morph_runtime.weights.spec import ModelSpec
from morph_runtime.weights.static import StaticWeights

BLOCK = 16
RUNGS: tuple[Rung, ...] = ("full", "w8", "w4")


class PlainKV:
    """A zeroed KV cache in ordinary memory."""

    def __init__(self, spec: ModelSpec, blocks: int, dtype: torch.dtype) -> None:
        self._memory = torch.zeros(2, spec.layers, blocks, BLOCK, spec.kv_heads, spec.head_dim, dtype=dtype)

    def k(self, layer: int) -> Tensor:
        """Keys of a layer."""
        return self._memory[0, layer]

    def v(self, layer: int) -> Tensor:
        """Values of a layer."""
        return self._memory[1, layer]


def aligned(nbytes: int) -> Tensor:
    """Bytes at a multiple of 64."""
    memory = torch.zeros(nbytes + 64, dtype=torch.uint8)
    first = -memory.data_ptr() % 64
    return memory[first : first + nbytes]


def decode(count: int, context: int, order: list[int]) -> StepBatch:
    """`count` sequences that get their token number `context`; scattered blocks."""
    blocks = -(-context // BLOCK)
    tables = [order[i * blocks : (i + 1) * blocks] for i in range(count)]
    slots = [table[(context - 1) // BLOCK] * BLOCK + (context - 1) % BLOCK for table in tables]
    parts = [SequenceSlice(i, 1, context) for i in range(count)]
    rows = torch.arange(count)
    return StepBatch(rows, torch.full((count,), context - 1), torch.tensor(slots), parts, tables, rows)


def prefill(tokens: int, order: list[int]) -> StepBatch:
    """One new prompt."""
    table = order[: -(-tokens // BLOCK)]
    slots = torch.tensor([table[i // BLOCK] * BLOCK + i % BLOCK for i in range(tokens)])
    parts = [SequenceSlice(0, tokens, tokens)]
    return StepBatch(torch.arange(tokens), torch.arange(tokens), slots, parts, [table], torch.tensor([tokens - 1]))


def random_model(folder: str) -> str:
    """Save random weights of the demo model's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = LlamaConfig(**shape, **heads, max_position_embeddings=2048, tie_word_embeddings=True)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or random_model(folder)
        spec, reader = ModelSpec.from_folder(path), CheckpointReader(path)
        slots, static = LayerSlots(spec, reader, torch.bfloat16, RUNGS), StaticWeights(spec, reader, torch.bfloat16)
        static_slot = aligned(static.static_bytes)
        static.fill(static_slot)
        layers: dict[Rung, list[LayerWeights]] = {rung: [] for rung in RUNGS}
        fill_ms: dict[str, list[float]] = {rung: [] for rung in RUNGS}
        for rung in RUNGS:
            for number in range(spec.layers):
                slot = aligned(slots.slot_bytes(rung))
                begin = time.perf_counter()
                slots.fill(number, rung, slot, None if rung == "full" else layers["full"][number])
                fill_ms[rung].append((time.perf_counter() - begin) * 1e3)
                layers[rung].append(slots.bind(number, rung, slot))
    blocks = 32 * -(-options.context // BLOCK) + 64
    order = torch.randperm(blocks).tolist()
    kv = PlainKV(spec, blocks, torch.bfloat16)
    decoder = Decoder(spec, static.bind(static_slot), kv, aligned(slots.scratch_bytes))
    steps = {f"decode {b}": decode(b, options.context, order) for b in (1, 2, 4, 8, 16, 32)}
    steps |= {f"prefill {n}": prefill(n, order) for n in (64, 128, 256, 512)}
    results: dict[str, dict[str, list[float]]] = {}
    print(f"context {options.context}, {options.threads} threads, ms per step: least (median)")
    for label, batch in steps.items():
        times: dict[str, list[float]] = {rung: [] for rung in RUNGS}
        for _ in range(options.rounds):
            for rung in RUNGS:
                decoder.forward(batch, layers[rung])  # brings this rung's weights to the caches that hold them
                begin = time.perf_counter()
                decoder.forward(batch, layers[rung])
                times[rung].append((time.perf_counter() - begin) * 1e3)
        results[label] = {r: [round(min(t), 2), round(statistics.median(t), 2)] for r, t in times.items()}
        print(f"{label:12}", "  ".join(f"{r} {low:6.2f} ({mid:6.2f})" for r, (low, mid) in results[label].items()))
    fills = {rung: round(statistics.median(t), 2) for rung, t in fill_ms.items()}
    print("fill of one layer, ms:", fills)
    if options.out:
        sizes = {rung: slots.slot_bytes(rung) for rung in RUNGS}
        values = {
            "torch": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": options.threads,
            "context": options.context,
            "slot_bytes": sizes,
            "scratch_bytes": slots.scratch_bytes,
            "fill_ms": fills,
            "step_ms_least_median": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
