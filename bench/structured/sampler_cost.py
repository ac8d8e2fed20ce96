"""Time of `Sampler.sample` for a batch of plain requests, and with one request that uses a feature.

python bench/structured/sampler_cost.py [--rows 256] [--vocab 4096] [--threads 1] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from morph_runtime.engine.messages import SamplingParams, StructuredOutputs
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.sampling.sampler import Sampler
from morph_runtime.structured.compiler import GrammarCompiler

ROUNDS = 60
OUTPUT = 200
SCHEMA = '{"type": "array", "items": {"type": "string"}}'
FEATURES = {
    "greedy": SamplingParams(temperature=0),
    "drawn": SamplingParams(temperature=1),
    "seeded": SamplingParams(temperature=1, seed=1),
    "min_p": SamplingParams(temperature=1, min_p=0.1),
    "top_p": SamplingParams(temperature=1, top_p=0.9),
    "penalties": SamplingParams(temperature=0, repetition_penalty=1.1, presence_penalty=0.1),
    "bad words": SamplingParams(temperature=0, bad_word_ids=((5, 6), (7,))),
    "logit bias": SamplingParams(temperature=0, logit_bias=((3, 1.0),)),
    "logprobs 5": SamplingParams(temperature=0, logprobs=5),
    "structured": SamplingParams(temperature=0, structured_outputs=StructuredOutputs("json", SCHEMA)),
}


@dataclass
class Tokens:
    """A sequence that is not growing."""

    tokens: list[int] = field(default_factory=lambda: [1] * OUTPUT)
    prompt_len: int = 0


def median_ms(rows: list[SamplingRow], vocab: int, threads: int) -> float:
    sampler = Sampler((0,), torch.device("cpu"), threads)
    logits = torch.randn(len(rows), vocab)
    times = []
    for _ in range(ROUNDS):
        scratch = logits.clone()
        began = time.perf_counter()
        sampler.sample(scratch, rows)
        times.append(time.perf_counter() - began)
    return round(statistics.median(times) * 1e3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, default=Path("models/morph-demo"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sampler_cost_cpu.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    compiler = GrammarCompiler(given.model / "tokenizer.json", given.vocab, (0,), 4)

    def make(params: SamplingParams) -> SamplingRow:
        wanted = params.structured_outputs
        if wanted is None:
            return SamplingRow(params, Tokens())
        return SamplingRow(params, Tokens([], 0), compiler.compile(wanted).result().matcher())

    plain = FEATURES["greedy"]
    result = {}
    for name, params in FEATURES.items():
        mixed = [make(params), *(make(plain) for _ in range(given.rows - 1))]
        every = [make(params) for _ in range(given.rows)]
        result[name] = {
            "one_ms": median_ms(mixed, given.vocab, given.threads),
            "all_ms": median_ms(every, given.vocab, given.threads),
        }
        times = "   ".join(f"{which} {ms:7.3f}" for which, ms in result[name].items())
        print(f"{name:12} {times}")
    compiler.close()
    given.out.write_text(json.dumps({"rows": given.rows, "vocab": given.vocab, "features": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
