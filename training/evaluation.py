"""Held-out perplexity: by position, of repeated passages, and under round-to-nearest weight quantization."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

POSITION_EDGES = (0, 32, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048)
"""Bin edges, in tokens, of the perplexity-by-position table."""

RECALL_DISTANCES = (128, 256, 512, 768, 1024)
"""Distances, in tokens, at which the repetition of a passage is measured."""


@dataclass(frozen=True)
class Perplexity:
    """What one pass over a text gave.

    Attributes:
        tokens: number of predicted tokens.
        nll: mean negative log-likelihood, nats per token.
        perplexity: ``exp(nll)``, per token.
        bits_per_byte: total negative log-likelihood in bits over the UTF-8 bytes of the predicted text.
        by_position: perplexity of the tokens whose position in the window lies in ``"from-to"`` (half-open).
    """

    tokens: int
    nll: float
    perplexity: float
    bits_per_byte: float
    by_position: dict[str, float]

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON-ready values, rounded."""
        fields = asdict(self)
        for key in ("nll", "perplexity", "bits_per_byte"):
            fields[key] = round(fields[key], 4)
        fields["by_position"] = {k: round(v, 3) for k, v in self.by_position.items()}
        return fields


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokens: torch.Tensor, bytes_per_token: float, seq_len: int, batch: int = 16
) -> Perplexity:
    """Measure perplexity over ``tokens`` (int ``[tokens]``) in non-overlapping windows of ``seq_len`` inputs.

    The model runs in its own dtype (under the caller's autocast, if any); the loss is taken in float32. What is
    left after the last full window is not scored.
    """
    device = next(model.parameters()).device
    windows = (len(tokens) - 1) // seq_len
    if windows < 1:
        raise ValueError(f"the text has {len(tokens)} tokens: no full window of {seq_len}")
    starts = torch.arange(windows)[:, None] * seq_len
    was_training = model.training
    model.eval()
    total = torch.zeros(seq_len, dtype=torch.float64, device=device)
    for first in range(0, windows, batch):
        rows = tokens[starts[first : first + batch] + torch.arange(seq_len + 1)].long().to(device)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        total += losses.view(-1, seq_len).double().sum(0)
    model.train(was_training)
    by_position: dict[str, float] = {}
    for low, high in itertools.pairwise(POSITION_EDGES):
        if low < seq_len:
            high = min(high, seq_len)
            by_position[f"{low}-{high}"] = math.exp(float(total[low:high].mean()) / windows)
    nll = float(total.sum()) / (windows * seq_len)
    return Perplexity(windows * seq_len, nll, math.exp(nll), nll / math.log(2) / bytes_per_token, by_position)


@torch.no_grad()
def measure_recall(
    model: LlamaForCausalLM, tokens: torch.Tensor, distance: int, passages: int = 32
) -> dict[str, float]:
    """Measure how well the model repeats a passage that it saw ``distance`` tokens earlier.

    Each of ``passages`` passages is cut from ``tokens`` (int ``[tokens]``), is ``distance`` tokens long and given
    twice. The result has the perplexity of the first and of the second time; a model that looks back so far is much
    better the second time. The first 16 tokens are not scored: so much it may take to see that it is a repeat.
    """
    device = next(model.parameters()).device
    passages = min(passages, len(tokens) // distance)
    if passages < 1 or distance <= 17:
        raise ValueError(f"no passage of {distance} tokens to repeat in a text of {len(tokens)} tokens")
    was_training = model.training
    model.eval()
    first, second = 0.0, 0.0
    for chunk in tokens[: passages * distance].view(passages, distance).split(8):
        rows = chunk.long().to(device).repeat(1, 2)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1)
        first += float(losses[:, 16 : distance - 1].mean()) * len(rows) / passages
        second += float(losses[:, distance + 16 :].mean()) * len(rows) / passages
    model.train(was_training)
    return {"first": round(math.exp(first), 3), "second": round(math.exp(second), 3)}


def recall_by_distance(model: LlamaForCausalLM, tokens: torch.Tensor, seq_len: int) -> dict[str, dict[str, float]]:
    """Return :func:`measure_recall` for each of :data:`RECALL_DISTANCES` that fits twice into ``seq_len`` tokens."""
    return {str(d): measure_recall(model, tokens, d) for d in RECALL_DISTANCES if 2 * d <= seq_len}


def round_w8(weight: torch.Tensor) -> torch.Tensor:
    """Round ``[out, in]`` to symmetric int8 with one scale per output channel, and return it dequantized."""
    full = weight.float()
    scale = full.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return ((full / scale).round().clamp(-127, 127) * scale).to(weight.dtype)


def round_w4(weight: torch.Tensor, group: int = 128) -> torch.Tensor:
    """Round ``[out, in]`` to asymmetric 4-bit, one scale and zero point per ``group`` inputs, and dequantize it."""
    if weight.shape[1] % group:
        raise ValueError(f"{weight.shape[1]} inputs do not divide into groups of {group}")
    full = weight.float().view(weight.shape[0], -1, group)
    low = full.amin(dim=2, keepdim=True).clamp(max=0)
    high = full.amax(dim=2, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-12) / 15
    zero = (-low / scale).round()
    codes = ((full / scale).round() + zero).clamp(0, 15)
    return ((codes - zero) * scale).view_as(weight).to(weight.dtype)


def with_rounded_linears(model: LlamaForCausalLM, rounding: Callable[[torch.Tensor], torch.Tensor]) -> LlamaForCausalLM:
    """Return a copy of ``model`` whose decoder linears went through ``rounding``; embeddings and head stay."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounding(module.weight))
    return rounded


def full_report(
    model: LlamaForCausalLM,
    valid: torch.Tensor,
    valid_bytes_per_token: float,
    train: torch.Tensor | None,
    seq_len: int,
) -> dict[str, object]:
    """Measure everything a model card needs.

    ``valid`` and ``train`` are int ``[tokens]``; ``train`` (a slice of the training text, for the gap between
    seen and unseen text) may be None. ``model`` is used as it is: pass it in the dtype that is to be reported.
    """
    report: dict[str, object] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "window_tokens": seq_len,
        "valid": measure(model, valid, valid_bytes_per_token, seq_len).to_json(),
        "recall": recall_by_distance(model, valid, seq_len),
    }
    for name, rounding in (("valid_w8_rtn", round_w8), ("valid_w4_g128_rtn", round_w4)):
        rounded = with_rounded_linears(model, rounding)
        report[name] = measure(rounded, valid, valid_bytes_per_token, seq_len).to_json()
        report[name.replace("valid", "recall")] = recall_by_distance(rounded, valid, seq_len)
    if train is not None:
        seen = measure(model, train, valid_bytes_per_token, seq_len)
        report["train_slice"] = {"tokens": seen.tokens, "perplexity": round(seen.perplexity, 4)}
    return report
