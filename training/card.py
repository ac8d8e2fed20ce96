"""Write a model folder's README.md: what training measured, and samples that the folder itself generates.

python training/card.py --model models/morph-demo --data-note training/data_note.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLE_TOKENS = 80
SAMPLE_SEED = 7
TEMPERATURE = 0.8
TOP_P = 0.95


def samples(folder: Path, prompts: list[str]) -> list[tuple[str, str, str]]:
    """Return ``(prompt, sampled continuation, greedy continuation)`` for each prompt, computed on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results: list[tuple[str, str, str]] = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        common = {"max_new_tokens": SAMPLE_TOKENS, "pad_token_id": tokenizer.pad_token_id}
        torch.manual_seed(SAMPLE_SEED)
        drawn = model.generate(**inputs, **common, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P)
        best = model.generate(**inputs, **common, do_sample=False, temperature=None, top_p=None)
        texts = [tokenizer.decode(ids[0, inputs.input_ids.shape[1] :]) for ids in (drawn, best)]
        results.append((prompt, texts[0], texts[1]))
    return results


def quote(text: str) -> str:
    """Return ``text`` as a Markdown block quote that keeps its line breaks."""
    return "\n".join(f"> {line}  " for line in text.split("\n"))


def perplexity_tables(evaluation: dict[str, Any]) -> list[str]:
    """Return the Markdown lines of the precision and the position tables."""
    names = {
        "valid": "bf16, as stored",
        "valid_w8_rtn": "W8: symmetric, one scale per output channel",
        "valid_w4_g128_rtn": "W4: asymmetric, groups of 128 along the input",
    }
    lines = ["| decoder linears | perplexity per token | bits per byte |", "|---|---|---|"]
    for key, name in names.items():
        row = evaluation[key]
        lines.append(f"| {name} | {row['perplexity']:.2f} | {row['bits_per_byte']:.4f} |")
    positions = evaluation["valid"]["by_position"]
    lines += [
        "",
        "By position in the window (held-out text, bf16):",
        "",
        "| position | " + " | ".join(positions) + " |",
        "|---" * (len(positions) + 1) + "|",
        "| perplexity | " + " | ".join(f"{v:.1f}" for v in positions.values()) + " |",
    ]
    return lines


def recall_table(evaluation: dict[str, Any]) -> list[str]:
    """Return the Markdown lines of the table of repeated passages."""
    distances = list(evaluation["recall"])
    lines = ["| distance, tokens | " + " | ".join(distances) + " |", "|---" * (len(distances) + 1) + "|"]
    rows = (
        ("first time", "recall", "first"),
        ("second time", "recall", "second"),
        ("second time, W8", "recall_w8_rtn", "second"),
        ("second time, W4", "recall_w4_g128_rtn", "second"),
    )
    for name, key, which in rows:
        lines.append(f"| {name} | " + " | ".join(f"{evaluation[key][d][which]:.1f}" for d in distances) + " |")
    return lines


def stage_table(stages: list[dict[str, Any]]) -> list[str]:
    """Return the Markdown lines of the table of training stages, oldest first."""
    heads = ["stage", "steps", "tokens", "epochs", "minutes", "peak rate", "decay over", "dropout", "copies"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for number, stage in enumerate(stages, 1):
        settings = stage["settings"]
        cells = [
            str(number),
            f"{stage['steps']:,}",
            f"{stage['tokens_seen'] / 1e6:,.0f} M",
            f"{stage['epochs']:.1f}",
            f"{stage['minutes']:.1f}",
            f"{settings['lr']:g}",
            f"last {settings['decay_share']:.0%}",
            f"{settings['dropout']:g}",
            f"{settings['copy_share']:.0%} of windows",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def curve_table(stages: list[dict[str, Any]]) -> list[str]:
    """Return the Markdown lines of seen and held-out perplexity over the run."""
    heads = ["stage", "step", "tokens", "epochs", "perplexity, seen text", "perplexity, held-out text"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for number, stage in enumerate(stages, 1):
        for p in stage["curve"]:
            counts = f"{number} | {p['step']:,} | {p['tokens'] / 1e6:,.0f} M | {p['epochs']:.1f}"
            lines.append(f"| {counts} | {p['train_ppl']:.2f} | {p['valid_ppl']:.2f} |")
    return lines


def render(folder: Path, prompts: list[str], data_note: str) -> str:
    """Return the whole card as Markdown."""
    report = json.loads((folder / "training_report.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    settings, evaluation = report["settings"], report["evaluation"]
    stages = [*report.get("earlier_stages", []), report]
    kv_bytes = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    lines = [
        "---",
        "license: apache-2.0",
        "language: en",
        "pipeline_tag: text-generation",
        "library_name: transformers",
        "---",
        f"# {folder.name}",
        "",
        f"A small language model ({report['parameters'] / 1e6:.1f} M parameters) trained from scratch on old English "
        "books. It exists to run, test and demonstrate MorphServe on a laptop: an ordinary Hugging Face "
        "`LlamaForCausalLM`, large enough that W8 and W4 mean something. It continues text; it answers no questions.",
        "",
        "## What it is",
        "",
        f"{config['num_hidden_layers']} layers, hidden {config['hidden_size']}, {config['num_attention_heads']} heads "
        f"of {config['head_dim']}, {config['num_key_value_heads']} KV heads, "
        f"intermediate {config['intermediate_size']}, vocabulary {config['vocab_size']} "
        "(byte-level BPE, trained on the same text), tied embeddings, no biases, "
        f"context {config['max_position_embeddings']} tokens, bf16. KV cache: {kv_bytes:,} bytes per token. "
        "`<|endoftext|>` is bos, eos and pad; the tokenizer adds none by itself.",
        "",
        "## Data",
        "",
        data_note.strip(),
        "",
        f"Training text: {report['train_bytes']:,} bytes, {report['train_tokens']:,} tokens. Held-out text: "
        f"{report['valid_bytes']:,} bytes, {report['valid_tokens']:,} tokens "
        f"({report['valid_bytes'] / report['valid_tokens']:.2f} bytes per token).",
        "",
        "## Training",
        "",
        f"{sum(s['tokens_seen'] for s in stages) / 1e6:,.0f} M tokens, {sum(s['epochs'] for s in stages):.0f} epochs, "
        f"{sum(s['minutes'] for s in stages):.0f} minutes on one {report['device']}, stages: {len(stages)}. AdamW, "
        f"{settings['batch_tokens']:,} tokens a step, weight decay {settings['weight_decay']:g}, seed "
        f"{settings['seed']}; windows of {settings['seq_len']} tokens, then {settings['context']} in the last "
        f"{settings['long_share']:.0%} "
        'of a stage. "Copies" are windows in which a passage comes twice, from which the model learns to look back.',
        "",
        *stage_table(stages),
        "",
        f'The course of training, in windows of {settings["seq_len"]}. "Seen" is the start of the training text, as '
        "long as the held-out text; other books, so part of the difference is their style:",
        "",
        *curve_table(stages),
        "",
        "The commands are in `training/README.md`; the figures in `training_report.json`.",
        "",
        "## Perplexity",
        "",
        f"Held-out text in non-overlapping windows of {evaluation['window_tokens']} tokens "
        f"({evaluation['valid']['tokens']:,} predicted tokens), {evaluation['dtype']} compute. W8 and W4 are plain "
        "round-to-nearest of all decoder linears, no calibration; embeddings and head stay as they are.",
        "",
        *perplexity_tables(evaluation),
        "",
        f"On seen text of the same length: {evaluation['train_slice']['perplexity']:.2f}. Reproduce with "
        f"`python training/evaluate.py --model {folder} --valid <held-out text>`.",
        "",
        "Repeated passages: a held-out passage as long as the distance, given twice; perplexity without its first 16 "
        "tokens, mean of 32 passages. It shows how far back the model really reads "
        f"(`python training/evaluate.py --model {folder} --valid <held-out text> --only-recall`):",
        "",
        *recall_table(evaluation),
        "",
        "## Samples",
        "",
        f"{SAMPLE_TOKENS} tokens after the prompt in bold, on a CPU in bf16, by "
        f"`python training/card.py --model {folder}`. Sampled: temperature {TEMPERATURE}, "
        f"top_p {TOP_P}, seed {SAMPLE_SEED}.",
        "",
    ]
    for prompt, drawn, best in samples(folder, prompts):
        lines += ["Sampled:", "", quote(f"**{prompt}**{drawn}"), "", "Greedy:", "", quote(f"**{prompt}**{best}"), ""]
    lines += [
        "## Limits",
        "",
        "* The sentences are English, the stories make no sense for long, and nothing it says is knowledge.",
        "* Greedy decoding soon repeats itself, as with any model of this size; sample instead.",
        "* It was not tuned for chat or instructions, knows no other language, and has no chat template.",
        "* In its training text a line break ends a paragraph; it has seen no blank lines, no code and hardly "
        "any lists.",
        "* All of its context is usable, but it draws little from what lies more than some 800 tokens back (see the "
        "table of repeated passages).",
        "* It hardly ever ends by itself: a document was a whole book. Set a token limit or a stop string.",
        "* Its books are of their time, and so are the views in them. No filter was applied to what it may say.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the card."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="folder written by train.py")
    p.add_argument("--data-note", type=Path, help="Markdown about the training text, put into the card as it is")
    p.add_argument(
        "--prompts",
        nargs="+",
        default=[
            "It was a dark night, and the old man",
            '"My dear Watson," said he,',
            "The captain looked out over the sea and",
        ],
    )
    args = p.parse_args()
    note = args.data_note.read_text(encoding="utf-8") if args.data_note else "See the training report for file names."
    (args.model / "README.md").write_text(render(args.model, args.prompts, note), encoding="utf-8")


if __name__ == "__main__":
    main()
