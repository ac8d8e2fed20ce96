"""Reproduce a model card's perplexities on the CPU or a GPU.

python training/evaluate.py --model models/morph-demo --valid c.txt.xz
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from corpus import encode_documents, read_documents
from evaluation import full_report, recall_by_distance, round_w4, round_w8, with_rounded_linears
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM


def main() -> None:
    """Print the full report of a model folder as JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    p.add_argument("--valid", type=Path, nargs="+", required=True, help="held-out text")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute precision")
    p.add_argument("--seq-len", type=int, default=2048, help="window, tokens")
    p.add_argument("--max-tokens", type=int, help="score only the first tokens, for a quick look")
    p.add_argument("--only-recall", action="store_true", help="measure repeated passages alone: quick on a CPU")
    args = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(device).eval()
    documents = read_documents(args.valid)
    tokens = encode_documents(Tokenizer.from_file(str(args.model / "tokenizer.json")), documents)
    bytes_per_token = sum(len(d.encode()) for d in documents) / len(tokens)
    if args.only_recall:
        report: dict[str, object] = {"recall": recall_by_distance(model, tokens, args.seq_len)}
        for name, rounding in (("recall_w8_rtn", round_w8), ("recall_w4_g128_rtn", round_w4)):
            report[name] = recall_by_distance(with_rounded_linears(model, rounding), tokens, args.seq_len)
    else:
        report = full_report(model, tokens[: args.max_tokens], bytes_per_token, None, args.seq_len)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
