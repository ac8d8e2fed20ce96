"""Train a small Llama on text files and write it as a Hugging Face folder.

    python training/train.py --text a.txt b.txt.xz --valid c.txt --out models/x

Sizes and the recipe are flags. One GPU is enough; without one it runs on the CPU, slowly.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import END_OF_TEXT, WindowSampler, encode_documents, read_documents, train_tokenizer
from evaluation import full_report, measure, measure_recall
from modeling import (
    NextTokenLoss,
    add_dropout,
    as_saved,
    build_config,
    build_model,
    load_model,
    parameter_groups,
    save_folder,
)
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

STAGE_KEYS = ("settings", "device", "steps", "tokens_seen", "epochs", "minutes", "curve")
"""What a report keeps of the stages before its own."""


@dataclass(frozen=True)
class Data:
    """Packed token streams (int32 ``[tokens]``, on the host) and what they were made from."""

    tokenizer: Tokenizer
    train: torch.Tensor
    valid: torch.Tensor
    train_bytes: int
    valid_bytes: int

    @property
    def valid_bytes_per_token(self) -> float:
        """UTF-8 bytes of held-out text per token."""
        return self.valid_bytes / len(self.valid)


def parse_args() -> argparse.Namespace:
    """Return the command line's settings; defaults train the demo model."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--text", type=Path, nargs="+", required=True, help="training text: .txt, .txt.xz or .txt.gz")
    p.add_argument("--valid", type=Path, nargs="+", required=True, help="held-out text, never trained on")
    p.add_argument("--out", type=Path, required=True, help="folder to write; an older model there is replaced")
    p.add_argument("--init-from", type=Path, help="go on from this folder's model and tokenizer; sizes are its own")
    p.add_argument("--tokenizer", type=Path, help="reuse this tokenizer.json instead of training one")
    p.add_argument("--vocab", type=int, default=4096, help="vocabulary entries, the special token included")
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--layers", type=int, default=12)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--kv-heads", type=int, default=2)
    p.add_argument("--intermediate", type=int, default=768)
    p.add_argument("--context", type=int, default=2048, help="longest context, tokens; the last phase trains on it")
    p.add_argument("--seq-len", type=int, default=1024, help="window of the main phase, tokens")
    p.add_argument("--long-share", type=float, default=0.2, help="share of the run trained at --context")
    p.add_argument("--steps", type=int, default=15000, help="optimizer steps of the whole run")
    p.add_argument("--batch-tokens", type=int, default=65536, help="tokens per optimizer step")
    p.add_argument("--micro-batch-tokens", type=int, default=65536, help="tokens per forward pass; memory bound")
    p.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    p.add_argument("--warmup", type=int, default=300, help="steps of linear warm-up")
    p.add_argument("--decay-share", type=float, default=0.7, help="share of the run in which the rate falls to 0")
    p.add_argument("--weight-decay", type=float, default=0.3)
    p.add_argument("--dropout", type=float, default=0.12, help="on the embedding's and each block's output")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--bos-share", type=float, default=0.1, help="windows that begin with the end-of-text token")
    p.add_argument("--copy-share", type=float, default=0.1, help="windows in which a passage comes twice")
    p.add_argument("--evals", type=int, default=8, help="held-out measurements, each followed by a checkpoint")
    p.add_argument("--max-minutes", type=float, help="shorten the schedule so that training ends by then")
    p.add_argument("--shard-mib", type=int, default=14, help="largest safetensors shard, MiB")
    p.add_argument("--seed", type=int, default=1234)
    p.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    args = p.parse_args()
    if args.init_from:
        args.tokenizer = args.init_from / "tokenizer.json"
    if args.batch_tokens % args.micro_batch_tokens or args.micro_batch_tokens % args.context:
        p.error("--batch-tokens must be a multiple of --micro-batch-tokens, and that one of --context")
    if args.micro_batch_tokens % args.seq_len or args.seq_len > args.context:
        p.error("--micro-batch-tokens must be a multiple of --seq-len, which must not exceed --context")
    return args


def load_data(args: argparse.Namespace) -> Data:
    """Read the texts, train or load the tokenizer, and encode everything."""
    train_docs, valid_docs = read_documents(args.text), read_documents(args.valid)
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(str(args.tokenizer))
        if tokenizer.token_to_id(END_OF_TEXT) is None:
            raise ValueError(f"{args.tokenizer} has no {END_OF_TEXT} token")
    else:
        tokenizer = train_tokenizer(train_docs, args.vocab)
    return Data(
        tokenizer=tokenizer,
        train=encode_documents(tokenizer, train_docs),
        valid=encode_documents(tokenizer, valid_docs),
        train_bytes=sum(len(d.encode()) for d in train_docs),
        valid_bytes=sum(len(d.encode()) for d in valid_docs),
    )


def learning_rate(progress: float, step: int, args: argparse.Namespace) -> float:
    """Return the rate at ``progress`` in [0, 1]: linear warm-up, a plateau, then linear decay to zero."""
    falling = min(1.0, (1 - progress) / args.decay_share) if args.decay_share > 0 else 1.0
    return args.lr * min((step + 1) / args.warmup, 1.0) * falling


class Trainer:
    """The training loop and its measurements."""

    def __init__(self, args: argparse.Namespace, data: Data, device: torch.device, started: float) -> None:
        """Build model and optimizer; ``started`` (monotonic seconds) is when the time limit began to run."""
        self.args, self.data, self.device, self.started = args, data, device, started
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        end_id = data.tokenizer.token_to_id(END_OF_TEXT)
        model = load_model(args.init_from) if args.init_from else self.new_model(end_id)
        if args.context > model.config.max_position_embeddings:
            raise ValueError(f"--context {args.context} exceeds the model's {model.config.max_position_embeddings}")
        args.hidden, args.layers = model.config.hidden_size, model.config.num_hidden_layers
        args.heads, args.kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        args.intermediate, args.vocab = model.config.intermediate_size, model.config.vocab_size
        self.model: LlamaForCausalLM = model.to(device)
        add_dropout(self.model, args.dropout)
        loss = NextTokenLoss(self.model)
        self.loss = loss if args.no_compile else torch.compile(loss, dynamic=False)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, args.weight_decay),
            lr=args.lr,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )
        self.sampler = WindowSampler(
            data.train,
            newline_id=data.tokenizer.encode("\n").ids[0],
            bos_id=end_id,
            bos_share=args.bos_share,
            copy_share=args.copy_share,
            seed=args.seed,
            device=device,
        )
        self.curve: list[dict[str, float]] = []
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.tokens_seen = 0

    def new_model(self, end_id: int) -> LlamaForCausalLM:
        """Return a freshly initialised model of the sizes asked for."""
        args, data = self.args, self.data
        config = build_config(
            vocab_size=data.tokenizer.get_vocab_size(),
            hidden=args.hidden,
            layers=args.layers,
            heads=args.heads,
            kv_heads=args.kv_heads,
            intermediate=args.intermediate,
            context=args.context,
            end_id=end_id,
        )
        return build_model(config)

    def autocast(self) -> torch.autocast:
        """Return the bf16 context of forward passes."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def progress(self, step: int, loop_started: float) -> float:
        """Return how much of the run is done, in [0, 1]: by steps, or by time where that runs out first."""
        by_steps = step / self.args.steps
        if self.args.max_minutes is None:
            return by_steps
        now = time.monotonic()
        by_time = (now - loop_started) / max(1e-9, self.started + 60 * self.args.max_minutes - loop_started)
        return min(1.0, max(by_steps, by_time))

    def checkpoint(self, step: int, progress: float, train_loss: float, loop_seconds: float) -> None:
        """Measure on held-out and on seen text, note it, and save the model as it is."""
        slice_ = self.data.train[: len(self.data.valid)]
        seq_len = self.args.seq_len
        with self.autocast():
            valid = measure(self.model, self.data.valid, self.data.valid_bytes_per_token, seq_len)
            seen = measure(self.model, slice_, self.data.valid_bytes_per_token, seq_len)
            recall = measure_recall(self.model, self.data.valid, seq_len // 2)
        point = {
            "step": step,
            "progress": round(progress, 4),
            "tokens": self.tokens_seen,
            "epochs": round(self.sampler.epochs, 2),
            "seconds": round(loop_seconds, 1),
            "train_loss_with_dropout": round(train_loss, 4),
            "train_ppl": round(seen.perplexity, 3),
            "valid_ppl": round(valid.perplexity, 3),
            "valid_bits_per_byte": round(valid.bits_per_byte, 4),
            "valid_repeat_ppl": recall["second"],
        }
        self.curve.append(point)
        print(json.dumps(point), flush=True)
        save_folder(as_saved(self.model), self.data.tokenizer, self.args.out, self.args.shard_mib)

    def step(self, seq_len: int, rate: float) -> torch.Tensor:
        """Run one optimizer step and return the mean loss (scalar on the device)."""
        accumulate = self.args.batch_tokens // self.args.micro_batch_tokens
        mean = torch.zeros((), device=self.device)
        for _ in range(accumulate):
            rows = self.sampler.batch(self.args.micro_batch_tokens // seq_len, seq_len)
            with self.autocast():
                loss = self.loss(rows) / accumulate
            loss.backward()
            mean += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens_seen += self.args.batch_tokens
        return mean

    def run(self) -> int:
        """Train to the end of the schedule; return the number of steps taken."""
        args = self.args
        self.model.train()
        loop_started = time.monotonic()
        step, evals_done = 0, 0
        running, running_steps = torch.zeros((), device=self.device), 0
        while (progress := self.progress(step, loop_started)) < 1:
            seq_len = args.seq_len if progress < 1 - args.long_share else args.context
            running += self.step(seq_len, learning_rate(progress, step, args))
            running_steps += 1
            step += 1
            if step in (1, 20, 100) or step % 1000 == 0:
                mean = float(running) / running_steps
                seconds = time.monotonic() - loop_started
                print(f"step {step} loss {mean:.4f} tokens {self.tokens_seen} at {seconds:.1f} s", flush=True)
                if not math.isfinite(mean):
                    raise FloatingPointError(f"loss is {mean} at step {step}")
            if progress * args.evals >= evals_done + 1:
                evals_done = int(progress * args.evals)
                seconds = time.monotonic() - loop_started
                self.checkpoint(step, progress, float(running) / running_steps, seconds)
                running, running_steps = torch.zeros_like(running), 0
        mean = float(running) / max(1, running_steps)
        self.checkpoint(step, 1.0, mean, time.monotonic() - loop_started)
        return step


def earlier_stages(folder: Path | None) -> list[dict[str, object]]:
    """Return what the report beside the model of ``folder`` says of how that model was made, oldest first."""
    if folder is None or not (folder / "training_report.json").exists():
        return []
    report = json.loads((folder / "training_report.json").read_text())
    return [*report.get("earlier_stages", []), {key: report[key] for key in STAGE_KEYS}]


def main() -> None:
    """Run the whole recipe and write ``training_report.json`` beside the model."""
    started = time.monotonic()
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_data(args)
    data_seconds = time.monotonic() - started
    print(f"data: {len(data.train)} training and {len(data.valid)} held-out tokens in {data_seconds:.0f} s", flush=True)
    stages = earlier_stages(args.init_from)
    trainer = Trainer(args, data, device, started)
    print(f"model: {trainer.parameters} parameters on {device}", flush=True)
    steps = trainer.run()
    final = as_saved(trainer.model)
    seen = data.train[: len(data.valid)]
    report = {
        "settings": {k: v for k, v in sorted(vars(args).items()) if not isinstance(v, Path | list)},
        "files": {"text": [p.name for p in args.text], "valid": [p.name for p in args.valid]},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "parameters": trainer.parameters,
        "train_tokens": len(data.train),
        "train_bytes": data.train_bytes,
        "valid_tokens": len(data.valid),
        "valid_bytes": data.valid_bytes,
        "steps": steps,
        "tokens_seen": trainer.tokens_seen,
        "epochs": round(trainer.sampler.epochs, 2),
        "minutes": round((time.monotonic() - started) / 60, 2),
        "curve": trainer.curve,
        "earlier_stages": stages,
        "evaluation": full_report(final, data.valid, data.valid_bytes_per_token, seen, args.context),
    }
    (args.out / "training_report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["evaluation"], indent=1))


if __name__ == "__main__":
    main()
