"""Generate under many random schemas at once and check every finished output with `jsonschema`.

python bench/structured/validity.py [--schemas 500] [--model models/morph-demo] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.structured.schemas import random_schema
from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.messages import Submit
from morph_runtime.text.parameters import parse_sampling_parameters
from morph_runtime.text.tokenizer import Tokenizer

PROMPT = "A child wrote this JSON: "


def run(model: Path, count: int, max_tokens: int, batch: int, threads: int) -> dict[str, Any]:
    tokenizer = Tokenizer.from_folder(model)
    engine = build_engine(
        EngineConfig.from_mapping(
            {
                "model": {"path": str(model)},
                "memory": {"kv_tokens": 16384},
                "scheduler": {"max_num_seqs": batch},
                "kernels": {"threads": threads},
                "morph": {"mode": "off"},
            }
        )
    )
    prompt = tokenizer.encode(PROMPT)
    for seed in range(count):
        wanted = {"json": random_schema(seed), "disable_any_whitespace": seed % 2 == 0}
        sampling = parse_sampling_parameters({"max_tokens": max_tokens, "seed": seed, "structured_outputs": wanted})
        engine.submit(Submit(key=seed, prompt=prompt, sampling=sampling, arrival_s=float(seed)))
    began = time.monotonic()
    tokens: dict[int, list[int]] = {seed: [] for seed in range(count)}
    reasons: dict[int, str] = {}
    details: list[str] = []
    while engine.has_requests:
        out = engine.step(decide=False)
        if out is None:
            continue
        for delta in out.tokens:
            tokens[delta.key] += delta.tokens
        for finished in out.finished:
            reasons[finished.key] = finished.reason
            details += [finished.detail] if finished.detail else []
    took = time.monotonic() - began
    engine.close()
    invalid = [s for s, reason in reasons.items() if reason == "stop" and not _valid(s, tokenizer.decode(tokens[s]))]
    counts = {reason: sum(r == reason for r in reasons.values()) for reason in ("stop", "length", "invalid")}
    return {
        "schemas": count,
        "finished": counts,
        "stop_share": counts["stop"] / count,
        "valid_of_stopped": counts["stop"] - len(invalid),
        "invalid_seeds": invalid,
        "refusals": details,
        "output_tokens": sum(map(len, tokens.values())),
        "seconds": round(took, 1),
    }


def _valid(seed: int, text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    validator = Draft202012Validator(random_schema(seed), format_checker=Draft202012Validator.FORMAT_CHECKER)
    return bool(validator.is_valid(value))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--model", type=Path, default=Path("models/morph-demo"))
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "validity_cpu.json")
    given = parser.parse_args()
    result = run(given.model, given.schemas, given.max_tokens, given.batch, given.threads)
    given.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=1, ensure_ascii=False))
    return 0 if not result["invalid_seeds"] and result["stop_share"] >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
