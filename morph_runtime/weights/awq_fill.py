"""Fills W4 slots from an AWQ checkpoint, so that the KV cache stays the same at every rung.

AWQ moves a scale per input channel of a linear into what comes before it. Between a norm and its linears, and inside
the MLP, that stays within the layer. But where v_proj and o_proj have equal shapes it divides the rows of v_proj and
multiplies the columns of o_proj: V of the quantized layer is c * V of the full-precision one, by channel, and blocks
written at one precision would be wrong for the other. So c is taken out again: v_proj's scales and bias are divided
by it, and the attention's output, which is linear in V, is multiplied by it before o_proj. o_proj itself cannot take
it, as its scales are shared by 128 inputs.

c is recovered by comparing v_proj in both checkpoints, after undoing the norm's share: row i of the quantized one is
c_i times the full one, apart from quantization noise. However far off the estimate is, the layer computes the same,
as c is divided out and multiplied in; only how well V fits the other precision depends on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.linear import GroupedInt4Kernel
from morph_runtime.kernels.quantize import MIDDLE
from morph_runtime.kernels.rung import GROUP
from morph_runtime.weights.awq import PER_WORD, AwqCheckpoint, Codes, PackedModule
from morph_runtime.weights.bound import BoundLinear, LayerWeights
from morph_runtime.weights.fused import FusedLinear, fused_linears
from morph_runtime.weights.norms import read_norms
from morph_runtime.weights.reader import CheckpointReader
from morph_runtime.weights.spec import ModelSpec

MIN_COSINE = 0.9
"""Between a row of v_proj and itself quantized, the median of some rows: 4 bits keep it above 0.98."""
PROBE_ROWS = 64
"""Rows of v_proj by which the two checkpoints are compared at start."""


class AwqFiller:
    """Writes layers of an AWQ checkpoint into slots. Keeps no weights; threads may fill at the same time."""

    def __init__(self, spec: ModelSpec, awq: AwqCheckpoint, full: CheckpointReader) -> None:
        """Compare v_proj of the first and the last layer, which shows whether both are of one model.

        Raises:
            ConfigError: they are not.
        """
        self._spec, self._awq, self._full = spec, awq, full
        self._linears = fused_linears(spec)
        self.rescales_v = spec.equal_v_and_o
        """Whether V is made canonical; o has an input scale then."""
        for layer in {0, spec.layers - 1}:
            self._compare(layer)

    @property
    def packed_bytes(self) -> int:
        """Upper bound of what a fill holds of the checkpoint at a time: its largest fused linear."""
        sizes = (linear.shape.out_features * linear.shape.in_features for linear in self._linears)
        return max(size // 2 + size // GROUP * 3 for size in sizes)

    def fill(self, target: LayerWeights, source: LayerWeights | None, chunk: int) -> None:
        """Write a layer.

        Args:
            target: views of a W4 slot.
            source: the same layer at full precision, or None: it is read where it is needed.
            chunk: weights to convert at a time.

        Raises:
            ConfigError: a checkpoint has changed since it was opened.
        """
        read_norms(self._spec, self._awq.reader, target.layer, target)
        for linear, bound in zip(self._linears, target.linears, strict=True):
            modules = [self._awq.module(part, target.layer) for part in linear.parts]
            kernel = bound.kernel
            assert isinstance(kernel, GroupedInt4Kernel)
            unit = max(PER_WORD, kernel.row_step)  # both powers of two
            step = max(1, chunk // linear.shape.in_features // unit) * unit
            for first in range(0, linear.shape.out_features, step):
                last = min(first + step, linear.shape.out_features)
                rows = _rows(linear, modules, first, last)
                if linear.shape.name == "qkv" and target.o.input_scale is not None:
                    rows = self._make_canonical(rows, first, target, target.o.input_scale, source)
                # As stored, so that the zero belongs to the scale that the kernel multiplies with.
                scales = rows.scales.to(kernel.dtype)
                zeros = (MIDDLE - rows.zero_points.float()) * scales.float()
                kernel.pack_codes(rows.codes, scales, zeros, bound.tensors, first)
            self._fill_bias(linear, bound, target)

    def _make_canonical(
        self, rows: Codes, first: int, target: LayerWeights, input_scale: Tensor, source: LayerWeights | None
    ) -> Codes:
        """Divide those rows of qkv that belong to v_proj by c, and write that part of c into o's input scale.

        Args:
            rows: of qkv, from row `first`.
            first: row of the fused linear.
            target: the layer; its input norm is there already.
            input_scale: of o, [heads * head_dim].
            source: the layer at full precision, or None.
        """
        v = self._linears[0].parts[2]
        low = max(first, v.first)
        count = first + rows.codes.shape[0] - low
        if count <= 0:
            return rows
        if source is not None:
            full, norm = source.qkv.tensors["weight"][low : low + count], source.input_norm
        else:
            name = v.module.format(target.layer)
            full = self._full.read(f"{name}.weight", input_scale.dtype, low - v.first, count)
            norm = self._full.read(self._spec.family.input_norm.format(target.layer), input_scale.dtype)
        part = slice(low - first, None)
        quantized = Codes(rows.codes[part], rows.zero_points[:, part], rows.scales[:, part])
        factors = recover_v_scale(quantized.dequantize(), full.float(), target.input_norm.float(), norm.float())[0]
        stored = input_scale[low - v.first : low - v.first + count]
        stored.copy_(factors)
        scales = rows.scales.clone()
        scales[:, part] /= stored.float()
        return Codes(rows.codes, rows.zero_points, scales)

    def _fill_bias(self, linear: FusedLinear, bound: BoundLinear, target: LayerWeights) -> None:
        if bound.bias is None:
            return
        linear.read_rows(self._awq.reader, target.layer, "bias", bound.bias, 0)
        if linear.shape.name == "qkv" and target.o.input_scale is not None:
            bound.bias[linear.parts[2].first :].div_(target.o.input_scale)

    def _compare(self, layer: int) -> None:
        part, name = self._linears[0].parts[2], self._spec.family.input_norm.format(layer)
        count = min(PROBE_ROWS, part.rows) // PER_WORD * PER_WORD
        quantized = self._awq.module(part, layer).rows(0, count).dequantize()
        full = self._full.read(f"{part.module.format(layer)}.weight", torch.float32, 0, count)
        norms = self._awq.reader.read(name, torch.float32), self._full.read(name, torch.float32)
        cosine = float(recover_v_scale(quantized, full, *norms)[1].median())
        if cosine < MIN_COSINE:
            raise ConfigError(
                f"{self._awq.reader.folder} is the AWQ checkpoint of another model: '{part.module.format(layer)}' "
                f"does not fit that of model.path (cosine {cosine:.2f}, at least {MIN_COSINE} is expected)."
            )


def recover_v_scale(quantized: Tensor, full: Tensor, norm: Tensor, full_norm: Tensor) -> tuple[Tensor, Tensor]:
    """How AWQ has scaled rows of v_proj, and how well they fit apart from that.

    Args:
        quantized: rows of the AWQ checkpoint's v_proj, float32 [n, K].
        full: the same rows in full precision, float32 [n, K].
        norm: AWQ's norm before it, float32 [K].
        full_norm: that norm in full precision, float32 [K].

    Returns:
        c float32 [n], 1 where it cannot be told, and the cosine of each pair of rows, float32 [n].
    """
    # Weights as seen from before the norm, where both layers get the same input.
    ours, theirs = quantized * norm, full * full_norm
    product, square = (ours * theirs).sum(1), theirs.square().sum(1)
    factors = product / square
    cosines = product / (square * ours.square().sum(1)).sqrt()
    told = factors.isfinite() & (factors > 0)
    return torch.where(told, factors, 1.0), cosines.nan_to_num(1.0)


def _rows(linear: FusedLinear, modules: list[PackedModule], first: int, last: int) -> Codes:
    """Rows [first, last) of a fused linear; both multiples of 8, as are the borders of its parts."""
    pieces = []
    for part, module in zip(linear.parts, modules, strict=True):
        low, high = max(first, part.first), min(last, part.first + part.rows)
        if low < high:
            pieces.append(module.rows(low - part.first, high - part.first))
    if len(pieces) == 1:
        return pieces[0]
    return Codes(
        torch.cat([piece.codes for piece in pieces]),
        torch.cat([piece.zero_points for piece in pieces], 1),
        torch.cat([piece.scales for piece in pieces], 1),
    )
