"""Train a model of about 100 M parameters on a GPU in minutes, then measure what quantizing its layers costs.

    python bench/quality/gpu.py --text books.txt.xz --valid valid.txt.xz --out RESULT.json [--minutes 4.5]

Three programs one after the other, each as a user would run it: training/train.py, `morph profile` and `morph quality`
with the kernels of the GPU. Only the JSON is kept unless --keep names a folder. W4 is rounded to nearest; for AWQ, keep
the model, run `morph quantize` on it where AutoAWQ is installed, then `morph quality --awq`. `--size tiny --device cpu`
tries everything out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, list[str]] = {
    # 16 layers of 6.3 M parameters, and 12.6 M of embeddings: 113 M.
    "100m": [
        "--vocab", "16384", "--hidden", "768", "--layers", "16", "--heads", "12", "--kv-heads", "4",
        "--intermediate", "2048", "--context", "1024", "--seq-len", "1024", "--long-share", "0",
        "--batch-tokens", "131072", "--micro-batch-tokens", "65536", "--lr", "2e-3", "--warmup", "100",
        "--weight-decay", "0.1", "--dropout", "0.05", "--evals", "2", "--shard-mib", "4096",
    ],
    "tiny": [
        "--vocab", "512", "--hidden", "128", "--layers", "3", "--heads", "2", "--kv-heads", "1",
        "--intermediate", "256", "--context", "256", "--seq-len", "256", "--long-share", "0",
        "--batch-tokens", "2048", "--micro-batch-tokens", "2048", "--warmup", "10", "--evals", "1", "--no-compile",
    ],
}  # fmt: skip


def run(name: str, arguments: list[str], seconds: dict[str, float]) -> None:
    """Run a program of this repository; ends if it fails."""
    began = time.monotonic()
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    if subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=False).returncode:
        raise SystemExit(f"{name} has failed: its error stands above")
    seconds[name] = round(time.monotonic() - began, 1)
    print(f"{name}: {seconds[name]} s", flush=True)


def measured(command: str, model: Path, text: Path, out: Path, *more: str) -> list[str]:
    """The arguments of a measurement on the device of `main`."""
    return ["-m", "morph_runtime.profile", command, str(model), "--text", str(text), "--out", str(out), *more]


def table(report: dict[str, Any]) -> str:
    """Levels of a report, a line each."""
    lines = [f"full: perplexity {report['full']['perplexity']:.3f}"]
    for series in report["series"]:
        lines += [
            f"{','.join(series['ladder']):6} {series['order']:14} level {row['level']:3} bytes "
            f"{row['layer_bytes_share']:.0%} perplexity {row['perplexity_change']:+.3%} KL {row['kl']:.5f} "
            f"top-1 {row['top1']:.2%}"
            for row in series["rows"]
        ]
    return "\n".join(lines)


def main() -> None:
    """Train, find orders, measure, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="training text")
    parser.add_argument("--valid", type=Path, required=True, help="held-out text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.5, help="of training, tokenizing included")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, to save the time of training one")
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--windows", type=int, default=128, help="of 512 tokens, that quality is measured on")
    parser.add_argument("--keep", type=Path, help="folder for the model")
    given = parser.parse_args()
    text, valid = given.text.resolve(), given.valid.resolve()
    tokens = "512" if given.size == "100m" else "128"
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        model = given.keep.resolve() if given.keep else room / "model"
        training = [
            str(ROOT / "training" / "train.py"), "--text", str(text), "--valid", str(valid), "--out", str(model),
            "--max-minutes", str(given.minutes), "--steps", "1000000", *SIZES[given.size],
        ]  # fmt: skip
        if given.tokenizer:
            training += ["--tokenizer", str(given.tokenizer.resolve())]
        run("train", training, seconds)
        shared = ["--device", given.device, "--window-tokens", tokens]
        order, levels, orders = room / "order.json", room / "levels.json", room / "orders.json"
        wide = ["--windows", str(given.windows), *shared]
        run("levels", measured("quality", model, valid, levels, "--ladder", "w8,w4", "--ladder", "w4", *wide), seconds)
        # Importance on text of the training set, as the held-out text is what the orders are judged by.
        run("importance", measured("profile", model, text, order, "--windows", "8", *shared), seconds)
        compared = [
            "--order",
            str(order),
            "--order",
            "front_to_back",
            "--order",
            "back_to_front",
            "--order",
            "random:1",
        ]
        run("orders", measured("quality", model, valid, orders, "--ladder", "w4", *compared, *wide), seconds)
        found = {
            "seconds": seconds,
            "training": json.loads((model / "training_report.json").read_text(encoding="utf-8")),
            "levels": json.loads(levels.read_text(encoding="utf-8")),
            "importance": json.loads(order.read_text(encoding="utf-8")),
            "orders": json.loads(orders.read_text(encoding="utf-8")),
        }
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found["levels"]), table(found["orders"]), sep="\n")


if __name__ == "__main__":
    main()
