"""How the modules of a checkpoint make up the fused linears of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from morph_runtime.kernels.linear import LinearShape
from morph_runtime.weights.reader import CheckpointReader
from morph_runtime.weights.spec import ModelSpec


@dataclass(frozen=True)
class Part:
    """A module of the checkpoint that makes up some rows of a fused linear."""

    module: str
    """Its name, with a place for the layer number."""
    first: int
    """Its first row in the fused linear."""
    rows: int


@dataclass(frozen=True)
class FusedLinear:
    """A linear of every layer and what it is made of, in the order of its rows."""

    shape: LinearShape
    parts: tuple[Part, ...]
    bias: bool

    def read_rows(self, reader: CheckpointReader, layer: int, what: str, out: Tensor, first: int) -> None:
        """Rows [first, first + n) of a layer's `weight` [n, K] or `bias` [n], from a checkpoint into `out`."""
        last = first + out.shape[0]
        for part in self.parts:
            low, high = max(first, part.first), min(last, part.first + part.rows)
            if low < high:
                name = f"{part.module.format(layer)}.{what}"
                reader.read_into(name, out[low - first : high - first], low - part.first)


def fused_linears(spec: ModelSpec) -> tuple[FusedLinear, FusedLinear, FusedLinear, FusedLinear]:
    """In the order of ModelSpec.linears: qkv, o, gate_up, down."""
    family, kv = spec.family, spec.kv_heads * spec.head_dim
    qkv, o, gate_up, down = spec.linears
    return (
        FusedLinear(qkv, _stack(family.qkv, (spec.heads * spec.head_dim, kv, kv)), spec.qkv_bias),
        FusedLinear(o, _stack((family.o,), (spec.hidden,)), spec.o_bias),
        FusedLinear(gate_up, _stack(family.gate_up, (spec.ffn, spec.ffn)), spec.mlp_bias),
        FusedLinear(down, _stack((family.down,), (spec.hidden,)), spec.mlp_bias),
    )


def _stack(modules: tuple[str, ...], rows: tuple[int, ...]) -> tuple[Part, ...]:
    return tuple(Part(name, sum(rows[:i]), rows[i]) for i, name in enumerate(modules))
