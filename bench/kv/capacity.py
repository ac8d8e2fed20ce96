"""Tokens of KV cache that one memory budget holds: by what the cache stores, and by rung of all layers.

    python bench/kv/capacity.py [--model models/morph-demo] [--kv-tokens 2048]

The budget is the one that holds `--kv-tokens` tokens of the activation type at full precision.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import EngineParts
from morph_runtime.memory.ledger import GIB

KINDS = ("auto", "fp8", "int8")


def parts_for(model: str, memory: dict[str, object]) -> EngineParts:
    """What an engine with these settings is made of."""
    settings = {"model": {"path": model}, "memory": memory, "morph": {"mode": "off", "ladder": ["w8", "w4"]}}
    engine = build_engine(EngineConfig.from_mapping(settings))
    parts = engine.parts
    engine.close()
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/morph-demo")
    parser.add_argument("--kv-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("bench/kv/capacity.json"))
    args = parser.parse_args()
    budget = parts_for(args.model, {"kv_tokens": args.kv_tokens}).ledger.budget_bytes / GIB
    rows = []
    print("| KV cache | full | w8 | w4 | growth step |\n|---|---|---|---|---|")
    for kv in KINDS:
        parts = parts_for(args.model, {"budget_gib": budget, "kv_dtype": kv})
        size, layers = parts.config.memory.block_tokens, parts.spec.layers
        tokens = [parts.capacities[level] * size for level in (0, layers, 2 * layers)]
        step = parts.cache.quantum_blocks * size
        rows.append({"kv": parts.kv_format.name, "full": tokens[0], "w8": tokens[1], "w4": tokens[2], "step": step})
        print("| " + " | ".join(map(str, rows[-1].values())) + " |")
    args.out.write_text(json.dumps({"budget_gib": budget, "kv_tokens": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
