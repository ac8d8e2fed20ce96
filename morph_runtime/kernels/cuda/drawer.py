"""Draws for the host's sampler with the kernels that draw in the step's graph: the same noise, so the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from morph_runtime.kernels.cuda.shape import RowShapes, sample_shaped
from morph_runtime.sampling.rows import SamplingRow


class CounterDrawer:
    """A `sampling.draw.Drawer`. What a request's seed gives does not depend on whether the host looks at its scores."""

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
        """See `Drawer`. Waits for the device."""
        params, count = [row.params for row in rows], len(rows)

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=logits.device)

        shapes = RowShapes(
            top_ps=column([some.top_p for some in params], torch.float32),
            top_ks=column([some.top_k for some in params], torch.int32),
            min_ps=column([some.min_p for some in params], torch.float32),
            counts=column([0] * count, torch.int32),
            tokens=torch.zeros(count, 1, dtype=torch.int32, device=logits.device),
            biases=torch.zeros(count, 1, dtype=torch.float32, device=logits.device),
        )
        temperatures = column([some.temperature for some in params], torch.float32)
        seeds = column([row.draw_seed for row in rows], torch.int64)
        positions = column([row.output_len for row in rows], torch.int64)
        chosen = torch.empty(count, dtype=torch.int64, device=logits.device)
        sample_shaped(logits, temperatures, seeds, positions, shapes, chosen)
        tokens: list[int] = chosen.tolist()
        return tokens
