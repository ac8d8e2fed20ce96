"""What each KV cache type costs in quality, alone and together with quantized layers.

    python bench/kv/quality.py --valid held_out.txt.xz [--model models/morph-demo] [--windows 48]

Perplexity of held-out text by the engine's own decoder over its own paged cache, every token's K and V stored and
read back: windows of 1,024 tokens, in chunks of 256 as a server would prefill them. `again` is the perplexity of a
passage of 512 tokens that stands in the same window a second time (without its first 16 tokens): predicting it is
nearly all looking up keys and values, so it shows faults of the cache that ordinary prose hides. `drift` is the mean
absolute change of the log probability of the right token against the activation type at the same rung.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine
from morph_runtime.models.batch import SequenceSlice, StepBatch

WINDOW, PASSAGE, UNSCORED, CHUNK = 1024, 512, 16, 256


class Row(NamedTuple):
    """One line of the table."""

    kv: str
    rung: str
    perplexity: float
    again: float
    drift: float
    kv_bytes_per_token: int


def engine_for(model: str, kv: str) -> Engine:
    """An engine with room for one window."""
    settings = {
        "model": {"path": model},
        "memory": {"kv_tokens": 2 * WINDOW, "kv_dtype": kv},
        "morph": {"mode": "off", "ladder": ["w8", "w4"]},
        "kernels": {"threads": 1},
    }
    return build_engine(EngineConfig.from_mapping(settings))


def losses(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each of tokens[1:]; tokens int64 [T + 1] -> float32 [T]."""
    parts = engine.parts
    size = parts.config.memory.block_tokens
    table = torch.randperm(parts.cache.mapped_blocks)[: -(-(len(tokens) - 1) // size)].tolist()
    found = []
    for start in range(0, len(tokens) - 1, CHUNK):
        end = min(start + CHUNK, len(tokens) - 1)
        positions = torch.arange(start, end)
        slots = torch.tensor([table[i // size] * size + i % size for i in range(start, end)])
        part = SequenceSlice(0, end - start, end)
        batch = StepBatch(tokens[start:end], positions, slots, [part], [table], torch.arange(end - start))
        logits = parts.runner.decoder.forward(batch, parts.swapper.layers)
        found.append(F.cross_entropy(logits, tokens[start + 1 : end + 1], reduction="none"))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/morph-demo")
    parser.add_argument("--valid", type=Path, required=True, help="held-out text, .txt or .xz")
    parser.add_argument("--kv", nargs="+", default=["auto", "fp8", "int8"])
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("bench/kv/quality.json"))
    args = parser.parse_args()
    data = args.valid.read_bytes()
    text = (lzma.decompress(data) if args.valid.suffix == ".xz" else data).decode()
    encoded = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json")).encode(text).ids
    stream = torch.tensor(encoded)
    stride = max(WINDOW, (len(stream) - WINDOW - 1) // args.windows)
    starts = range(0, min(args.windows * stride, len(stream) - WINDOW - 1), stride)
    rows, plain = [], {}
    for kv in args.kv:
        engine = engine_for(args.model, kv)
        layers = engine.parts.spec.layers
        for rung, level in (("full", 0), ("w8", layers), ("w4", 2 * layers)):
            engine.set_level(level)
            prose = torch.cat([losses(engine, stream[at : at + WINDOW + 1]) for at in starts])
            second = []
            for at in starts:
                passage = stream[at : at + PASSAGE]
                second.append(losses(engine, torch.cat([passage, passage]))[PASSAGE + UNSCORED - 1 :])
            prose_at_full_kv = plain.setdefault(rung, prose)
            row = Row(
                engine.info(0).kv_dtype, rung, round(math.exp(prose.mean()), 3),
                round(math.exp(torch.cat(second).mean()), 3), round(float((prose - prose_at_full_kv).abs().mean()), 4),
                engine.parts.cache.layout.block_bytes // engine.parts.config.memory.block_tokens,
            )  # fmt: skip
            rows.append(row)
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
        engine.close()
    report = {"tokens": len(starts) * WINDOW, "torch": torch.__version__, "rows": [row._asdict() for row in rows]}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
