"""Perplexity of a text at each rung and level, as the engine itself computes it (`prompt_logprobs`).

    python bench/quality/perplexity.py TEXT [--model models/morph-demo] [--awq DIR] [--ladder w8,w4] [--levels 0,6,12]
                                            [--windows 8] [--window-tokens 512] [--out FILE]

The text is cut into windows of equal length, each scored as a prompt of its own: every token but a window's first is
predicted from those before it. So weights are read by the kernels that serve, at the level that serves, and keys and
values go through the paged cache.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from morph_runtime.config import EngineConfig, resolve_model_folder
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import SamplingParams, Submit
from morph_runtime.errors import ConfigError
from morph_runtime.text.tokenizer import Tokenizer

RUNNING = 8
"""Windows scored at a time."""


def build(args: argparse.Namespace) -> Engine:
    """The engine, with its levels moved by hand."""
    settings: dict[str, Any] = {
        "model": {"path": args.model, "awq_path": args.awq},
        "memory": {"kv_tokens": (RUNNING + 1) * (args.window_tokens + 16)},
        "scheduler": {"max_num_seqs": 256},
        "morph": {"mode": "off", "ladder": args.ladder.split(",")},
        "kernels": {"threads": args.threads},
        "cache": {"prefix": False},
    }
    return build_engine(EngineConfig.from_mapping(settings))


def windows_of(text: Path, model: str, length: int, count: int) -> tuple[list[list[int]], float]:
    """Up to `count` windows of `length` tokens from the text's beginning, and its bytes per token.

    Raises:
        ConfigError: the text has not one window.
    """
    # Enough characters for so many tokens whatever the text is, and no more: tokenizing takes time.
    words = text.read_text(encoding="utf-8")[: 8 * length * count]
    tokens = Tokenizer.from_folder(resolve_model_folder(model)).encode_prompt(words, len(words.encode()))
    found = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)][:count]
    if not found:
        raise ConfigError(f"{text} has {len(tokens)} tokens, but a window takes {length}: lower --window-tokens.")
    return found, len(words.encode()) / len(tokens)


def score(engine: Engine, windows: list[list[int]]) -> list[float]:
    """The log probability of each predicted token, all windows in a row."""
    found: dict[int, list[float]] = {}
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    left = list(enumerate(windows))
    while left or engine.has_requests:
        while left and engine.parts.scheduler.num_running + engine.parts.scheduler.num_waiting < RUNNING:
            key, window = left.pop(0)
            engine.submit(Submit(key=key, prompt=window, sampling=sampling))
        out = engine.step(decide=False)
        for delta in out.tokens if out else ():
            found[delta.key] = [at.values[0] for at in delta.prompt_logprobs]
    return [value for key in sorted(found) for value in found[key]]


def main() -> int:
    """Score the text at each level; exit status 2 if that cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="models/morph-demo")
    parser.add_argument("--awq", default="")
    parser.add_argument("--ladder", default="w8,w4")
    parser.add_argument("--levels", default="", help="comma-separated; default: 0, and each rung with all layers")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        windows, bytes_per_token = windows_of(args.text, args.model, args.window_tokens, args.windows)
        engine = build(args)
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        print(error, file=sys.stderr)
        return 2
    layers = engine.parts.spec.layers
    levels = [int(n) for n in args.levels.split(",")] if args.levels else [*range(0, layers * 2 + 1, layers)]
    levels = [level for level in levels if 0 <= level < len(engine.parts.capacities)]
    rows = []
    print(f"{len(windows)} windows of {args.window_tokens} tokens, {bytes_per_token:.2f} bytes per token")
    print("| level | full | w8 | w4 | perplexity | bits per byte | against level 0 | s |\n" + "|---" * 8 + "|")
    for level in levels:
        engine.set_level(level)
        began = time.perf_counter()
        values = score(engine, windows)
        nll = -sum(values) / len(values)
        rungs = {rung: engine.parts.swapper.rungs.count(rung) for rung in ("full", "w8", "w4")}
        row = {
            "level": level, **rungs, "perplexity": round(math.exp(nll), 4),
            "bits_per_byte": round(nll / math.log(2) / bytes_per_token, 4), "tokens": len(values),
            "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip
        rows.append(row)
        change = 100 * (row["perplexity"] / rows[0]["perplexity"] - 1)
        print(
            f"| {level} | {rungs['full']} | {rungs['w8']} | {rungs['w4']} | {row['perplexity']:.3f} | "
            f"{row['bits_per_byte']:.4f} | {change:+.2f} % | {row['seconds']} |",
            flush=True,
        )
    engine.close()
    if args.out is not None:
        head = {"model": args.model, "awq": args.awq, "ladder": args.ladder, "text": args.text.name}
        args.out.write_text(json.dumps({**head, "window_tokens": args.window_tokens, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
