"""AWQ checkpoints in AutoAWQ's GEMM layout, read as they are.

A linear is `qweight` int32 [in, out / 8], `qzeros` int32 [in / 128, out / 8] and `scales` float16 [in / 128, out].
Eight 4-bit codes lie in an int32 along the outputs, from its low end in the order 0, 2, 4, 6, 1, 3, 5, 7; a weight is
(code - zero point) * scale. Source: AutoAWQ 0.2.9, `awq/utils/packing_utils.py` and `awq/modules/linear/gemm.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from morph_runtime.errors import ConfigError
from morph_runtime.kernels.rung import GROUP
from morph_runtime.weights.fused import Part, fused_linears
from morph_runtime.weights.norms import check_norms
from morph_runtime.weights.reader import CheckpointReader
from morph_runtime.weights.spec import ModelSpec

PER_WORD = 8
"""Codes in an int32."""
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Bit at which the code of each of eight consecutive outputs begins."""
SAME_FIELDS = (
    *("architecture", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "norm_eps", "rope"),
    *("qkv_bias", "o_bias", "mlp_bias", "windows"),
)
"""What an AWQ checkpoint of the same model has in common with it; sizes and constants of ModelSpec."""
SAMPLE_ROWS = 64
"""Rows of the embedding that are compared: any training changes some of them."""
FLOAT16_STEP = 2.0**-24
"""Distance of the smallest float16 values."""


@dataclass(frozen=True)
class Codes:
    """Rows of a quantized linear: weight = (code - zero point) * scale."""

    codes: Tensor
    """uint8 [n, K] in 0..15"""
    zero_points: Tensor
    """uint8 [K / 128, n] in 0..15"""
    scales: Tensor
    """float32 [K / 128, n]"""

    def dequantize(self) -> Tensor:
        """float32 [n, K]."""
        rows, inputs = self.codes.shape
        values = self.codes.float().view(rows, inputs // GROUP, GROUP)
        values.sub_(self.zero_points.t()[:, :, None]).mul_(self.scales.t()[:, :, None])
        return values.view(rows, inputs)


@dataclass(frozen=True)
class PackedModule:
    """A module as the checkpoint stores it (shapes above)."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    def rows(self, first: int, last: int) -> Codes:
        """Outputs [first, last), both multiples of 8."""
        words = slice(first // PER_WORD, last // PER_WORD)
        return Codes(
            unpack(self.qweight[:, words]).t().contiguous(),
            unpack(self.qzeros[:, words]),
            self.scales[:, first:last].float(),
        )


def unpack(words: Tensor) -> Tensor:
    """The codes of int32 [R, N / 8] in the order of outputs: uint8 [R, N]."""
    codes = torch.empty(*words.shape, PER_WORD, dtype=torch.uint8)
    for output, shift in enumerate(SHIFTS):
        codes[:, :, output].copy_((words >> shift) & 15)
    return codes.view(words.shape[0], -1)


class AwqCheckpoint:
    """The quantized layers of a model that is also there in full precision. Threads may read at the same time."""

    def __init__(self, folder: Path | str, spec: ModelSpec, full: CheckpointReader) -> None:
        """Open it and make sure that it is one of the same model.

        Args:
            folder: of the AWQ checkpoint.
            spec: the model.
            full: its checkpoint in full precision.

        Raises:
            ConfigError: another method, layout, group size or width, another model, or a tensor that is missing or
                has the wrong shape; the text names what.
        """
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise ConfigError(f"model.awq_path names '{folder}', which is not a folder with a config.json.")
        found = ModelSpec.from_folder(path, awq=True)
        for name in SAME_FIELDS:
            here, there = getattr(spec, name), getattr(found, name)
            if here != there:
                raise ConfigError(
                    f"{path} is the AWQ checkpoint of another model: its '{name}' is {there}, "
                    f"but that of model.path is {here}."
                )
        self._spec = spec
        self.reader = CheckpointReader(path)
        try:
            for layer in range(spec.layers):
                self._check_layer(layer)
            for name, rows in ((spec.family.embedding, spec.vocab), (spec.family.final_norm, spec.hidden)):
                self._compare(name, rows, full)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close its files; reading is an error from here on."""
        self.reader.close()

    def module(self, part: Part, layer: int) -> PackedModule:
        """Read one module of a layer.

        Raises:
            ConfigError: the checkpoint has changed since it was opened.
        """
        name = part.module.format(layer)
        qweight, qzeros, scales = (self.reader.read(f"{name}.{what}") for what in ("qweight", "qzeros", "scales"))
        return PackedModule(qweight, qzeros, scales)

    def _check_layer(self, layer: int) -> None:
        check_norms(self._spec, self.reader, layer)
        for linear in fused_linears(self._spec):
            inputs = linear.shape.in_features
            for part in linear.parts:
                name = part.module.format(layer)
                words, groups = part.rows // PER_WORD, inputs // GROUP
                if part.rows % PER_WORD or inputs % GROUP:
                    raise ConfigError(
                        f"{self.reader.folder}: '{name}' has {inputs} inputs and {part.rows} outputs, "
                        f"but AWQ needs multiples of {GROUP} and {PER_WORD}."
                    )
                self.reader.check(f"{name}.qweight", (inputs, words), torch.int32)
                self.reader.check(f"{name}.qzeros", (groups, words), torch.int32)
                self.reader.check(f"{name}.scales", (groups, part.rows))
                if linear.bias:
                    self.reader.check(f"{name}.bias", (part.rows,))

    def _compare(self, name: str, rows: int, full: CheckpointReader) -> None:
        """A tensor that AWQ leaves alone must be the same in both; a sample of its rows is compared."""
        self.reader.check(name, full.info(name).shape)
        rounding = torch.finfo(self.reader.info(name).dtype).eps
        for first in range(0, rows, -(-rows // SAMPLE_ROWS)):
            here = full.read(name, torch.float32, first, 1)
            there = self.reader.read(name, torch.float32, first, 1)
            if not torch.allclose(here, there, rtol=rounding, atol=FLOAT16_STEP):
                raise ConfigError(
                    f"{self.reader.folder} is the AWQ checkpoint of another model: its '{name}' differs from that "
                    "of model.path."
                )
