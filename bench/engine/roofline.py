"""What a step must read and compute, and how near a measured time comes to that."""

from __future__ import annotations

from dataclasses import dataclass

from morph_runtime.engine.core import EngineParts


@dataclass(frozen=True)
class Peaks:
    """Of the GPU, dense; the defaults are an H200's by its data sheet."""

    gb_s: float = 4800.0
    tflop_s: float = 989.0
    """bf16"""
    fp8_tflop_s: float = 1979.0


class Roofline:
    """Bytes and operations of the steps of one engine."""

    def __init__(self, parts: EngineParts, peaks: Peaks) -> None:
        spec, layout = parts.spec, parts.cache.layout
        self._spec, self._ledger, self._peaks = spec, parts.ledger, peaks
        self._fp8 = {
            rung for rung in parts.ledger.slot_bytes if "fp8" in parts.swapper._slots.kernel_names(rung).values()
        }
        self._head = spec.vocab * spec.hidden
        self._head_bytes = self._head * parts.dtype.itemsize
        self._linears = spec.layers * sum(linear.out_features * linear.in_features for linear in spec.linears)
        self.kv_token_bytes = layout.num_ranges * layout.range_block_bytes // layout.block_tokens

    def weight_bytes(self, rung: str) -> int:
        """All layers at a rung, and the output matrix."""
        return self._ledger.slot_bytes[rung] * self._spec.layers + self._head_bytes

    def against(self, ms: float, rung: str, tokens: int, rows: int, read: float, pairs: float) -> dict[str, float]:
        """Achieved GB/s and TFLOP/s of a step, and the share of the roofline: the least time it could take, of `ms`.

        Args:
            ms: measured.
            rung: of all layers.
            tokens: that run through the layers.
            rows: that run through the output matrix.
            read: tokens of KV cache that are read.
            pairs: of a query and a key.
        """
        spec, peaks = self._spec, self._peaks
        nbytes = self.weight_bytes(rung) + (read + tokens) * self.kv_token_bytes
        linears = 2.0 * tokens * self._linears
        others = 2.0 * rows * self._head + 4.0 * spec.layers * spec.heads * spec.head_dim * pairs
        peak = peaks.fp8_tflop_s if rung in self._fp8 else peaks.tflop_s
        compute = linears / (peak * 1e9) + others / (peaks.tflop_s * 1e9)
        return {
            "gb_s": nbytes / ms / 1e6,
            "tflop_s": (linears + others) / ms / 1e9,
            "of_roofline": max(nbytes / (peaks.gb_s * 1e6), compute) / ms,
        }
