"""Choice of the next tokens on a GPU for rows with top_p, top_k, min_p or biases, beside plain rows.

    python bench/gpu_kernels/shape.py

Needs an NVIDIA GPU. Scores are flat as a random model's (a spread of 1) or peaked as a trained one's (3). A call takes
biased scores out of the logits, so for the kind `all` they are put back before each; what that takes alone is
subtracted. Writes $OUT/shape.json where OUT is set.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timing import graph_us, save
from torch import Tensor

from morph_runtime.kernels.cuda.sample import sample
from morph_runtime.kernels.cuda.shape import RowShapes, sample_shaped

VOCAB = 128256
ENTRIES = 32
KINDS: dict[str, tuple[float, int, float, int]] = {
    "nothing": (1.0, 0, 0.0, 0), "top_p": (0.9, 0, 0.0, 0), "top_k": (1.0, 50, 0.0, 0),
    "top_k 1000": (1.0, 1000, 0.0, 0), "min_p": (1.0, 0, 0.05, 0), "both": (0.9, 50, 0.0, 0),
    "bans": (1.0, 0, 0.0, 3), "all": (0.9, 50, 0.01, 3),
}  # fmt: skip
"""top_p, top_k, min_p, entries; the last kind has a bias among them, the one before banned tokens alone."""


def shapes_of(rows: int, kind: str) -> RowShapes:
    top_p, top_k, min_p, entries = KINDS[kind]
    tokens = torch.arange(ENTRIES, dtype=torch.int32, device="cuda").expand(rows, -1).contiguous()
    biases = torch.full((rows, ENTRIES), float("-inf"), device="cuda")
    if kind == "all":
        biases[:, 0] = 1.5
    return RowShapes(
        torch.full((rows,), top_p, device="cuda"), torch.full((rows,), top_k, dtype=torch.int32, device="cuda"),
        torch.full((rows,), min_p, device="cuda"), torch.full((rows,), entries, dtype=torch.int32, device="cuda"),
        tokens, biases,
    )  # fmt: skip


def main() -> None:
    results = []
    for rows in (1, 8, 64, 256):
        temperatures, seeds = torch.full((rows,), 0.8, device="cuda"), torch.arange(rows, device="cuda")
        out = torch.zeros(rows, dtype=torch.int64, device="cuda")
        for spread in (1.0, 3.0):
            # One buffer, as in a step: the scores were just written and lie in the L2 cache.
            logits = (torch.randn(rows, VOCAB, device="cuda") * spread).bfloat16()
            calls: dict[str, Callable[[], object]] = {"plain": partial(sample, logits, temperatures, seeds, seeds, out)}
            for kind in KINDS:
                calls[kind] = partial(sample_shaped, logits, temperatures, seeds, seeds, shapes_of(rows, kind), out)

            def put_back(logits: Tensor = logits) -> None:
                logits[:, 0] = 2.0  # the call before has lifted it out

            def biased(put: Callable[[], None] = put_back, call: Callable[[], object] = calls["all"]) -> None:
                put()
                call()

            calls["all"] = biased
            for kind, call in calls.items():
                us = graph_us([call]) - (graph_us([put_back]) if kind == "all" else 0)
                results.append({"rows": rows, "spread": spread, "kind": kind, "us": round(us, 2)})
                print(results[-1], flush=True)
    save("shape", results)


if __name__ == "__main__":
    main()
