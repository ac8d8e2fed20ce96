"""Batches whose contexts fill the KV cache: which ones, for this engine and for another that is measured beside it."""

from __future__ import annotations

from collections.abc import Sequence

SHARE = 0.9
STEPS = 24
"""Steps, at least, in which the whole batch decodes."""


def filling(tokens: int, batches: Sequence[int], longest: int, chunk: int) -> list[tuple[int, int, int]]:
    """Batches that fill 90 % of a cache when they are half-way through their output.

    Sequences begin to decode one after the other, so the output is as many tokens as the prefills take steps, and some.

    Args:
        tokens: that the cache holds.
        batches: numbers of sequences; where a context would be too long for the model, more of them.
        longest: tokens of a request, prompt and output.
        chunk: tokens of a step.

    Returns:
        (sequences, prompt tokens, output tokens), without those that do not fit.
    """
    rows = []
    for wanted in batches:
        batch = max(wanted, -(-int(SHARE * tokens) // (longest - STEPS)))
        while True:
            output = -(-int(SHARE * tokens) // max(1, chunk - batch)) + STEPS
            prompt = int(SHARE * tokens / batch) - output // 2
            if prompt + output <= longest:
                break
            batch += 1
        if prompt > 0 and batch * (prompt + output + 16) <= tokens:
            rows.append((batch, prompt, output))
    return rows
