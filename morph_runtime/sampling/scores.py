"""Log probabilities of the chosen token and of the most likely ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from morph_runtime.engine.messages import LOGPROB_MIN, TokenLogprobs


def token_logprobs(
    logprobs: torch.Tensor,  # [rows, vocab] float32
    chosen: Sequence[int],
    counts: Sequence[int],
) -> list[TokenLogprobs]:
    """For each row: the chosen token with its rank, then the `counts[row]` most likely tokens.

    Takes a byte for each of the log probabilities, and what finding the most likely ones takes.
    """
    picked = torch.tensor(chosen, device=logprobs.device)[:, None]  # [rows, 1]
    value = logprobs.gather(1, picked)
    rank = (logprobs >= value).sum(dim=1).tolist()
    values, ids = logprobs.topk(min(max(counts), logprobs.shape[1]), dim=1)  # [rows, top]
    all_ids = torch.cat([picked, ids], dim=1).tolist()
    all_values = torch.cat([value, values], dim=1).clamp_(min=LOGPROB_MIN).tolist()
    return [
        TokenLogprobs(rank=r, ids=i[: n + 1], values=v[: n + 1])
        for r, i, v, n in zip(rank, all_ids, all_values, counts, strict=True)
    ]
