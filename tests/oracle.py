"""A dense decoder in float32, written apart from the engine's: what a model of the Llama family says at given rungs.

It keeps keys and values as they were computed and knows nothing of blocks, pages, batches or kernels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from morph_runtime.engine.core import Engine

Linears = Callable[[int, str], dict[str, torch.Tensor]]
"""What a layer at a rung multiplies with, float32 [out, in] by name, and its norms."""


@dataclass
class DenseRequest:
    """Keys and values of one request, per layer: [tokens, kv_heads, head_dim]."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)


class Oracle:
    """Replays slices at given rungs."""

    def __init__(
        self,
        folder: Path,
        linears: Linears,
        stored: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
        levels: Sequence[tuple[str, ...]] = (),
    ) -> None:
        """`stored` says what a cache makes of keys or values [tokens, kv_heads, head_dim]; `levels` are the rungs of
        each level, if known."""
        self.levels = levels
        config = json.loads((folder / "config.json").read_text())
        self._heads, self._head_dim = config["num_attention_heads"], config["head_dim"]
        self._eps = config["rms_norm_eps"]
        # Newer versions of transformers write `rope_theta` into `rope_parameters`.
        self._theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        weights = {name: w for file in folder.glob("*.safetensors") for name, w in load_file(file).items()}
        self._embedding = weights["model.embed_tokens.weight"].float()
        self._final_norm = weights["model.norm.weight"].float()
        self._linears = linears
        self._stored = stored
        self.requests: dict[int, DenseRequest] = {}

    def replay(self, key: int, tokens: list[int], start: int, rungs: tuple[str, ...]) -> torch.Tensor:
        """Logits [vocab] after `tokens`, which stand at positions `start`.. of request `key`."""
        return self.logits(key, tokens, start, rungs)[-1]

    def logits(self, key: int, tokens: list[int], start: int, rungs: tuple[str, ...]) -> torch.Tensor:
        """Logits [tokens, vocab] after each of `tokens`, which stand at positions `start`.. of request `key`."""
        if start == 0:  # also after a preemption: everything is computed anew
            self.requests[key] = DenseRequest()
        state = self.requests[key]
        x = self._embedding[tokens]
        positions = torch.arange(start, start + len(tokens))
        for layer, rung in enumerate(rungs):
            x = self._layer(x, positions, layer, self._linears(layer, rung), state)
        return self._norm(x, self._final_norm) @ self._embedding.T

    def _layer(
        self, x: torch.Tensor, positions: torch.Tensor, layer: int, w: dict[str, torch.Tensor], state: DenseRequest
    ) -> torch.Tensor:
        h = self._norm(x, w["input_norm"])
        qkv = h @ w["qkv"].T
        kv_heads = (qkv.shape[-1] // self._head_dim - self._heads) // 2
        q, k, v = qkv.view(len(x), -1, self._head_dim).split([self._heads, kv_heads, kv_heads], dim=1)
        q, k = self._rope(q, positions), self._rope(k, positions)
        k, v = self._stored(k), self._stored(v)
        if layer in state.keys:
            k, v = torch.cat([state.keys[layer], k]), torch.cat([state.values[layer], v])
        state.keys[layer], state.values[layer] = k, v
        k, v = (t.repeat_interleave(self._heads // kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / self._head_dim**0.5
        visible = torch.arange(k.shape[0])[None, :] <= positions[:, None]
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1)
        x = x + attended @ w["o"].T
        h = self._norm(x, w["post_norm"])
        gate, up = (h @ w["gate_up"].T).chunk(2, dim=-1)
        return x + (torch.nn.functional.silu(gate) * up) @ w["down"].T

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self._eps).sqrt() * weight

    def _rope(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        frequencies = self._theta ** (-torch.arange(0, self._head_dim, 2) / self._head_dim)
        angles = positions[:, None, None] * frequencies
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def weights_of(engine: Engine, layer: int) -> dict[str, torch.Tensor]:
    """Copies of a layer's norms and of what each linear multiplies with at its present rung: float32 [out, in]."""
    bound = engine.parts.swapper.layers[layer]
    found = {part.shape.name: part.dequantize() for part in bound.linears}
    found |= {"input_norm": bound.input_norm, "post_norm": bound.post_norm}
    return {name: tensor.to("cpu", copy=True) for name, tensor in found.items()}


def oracle_for(
    engine: Engine, folder: Path, stored: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
) -> Oracle:
    """An oracle with what the engine's layers multiply with at each of its levels."""
    dequantized, levels = {}, []
    for level in range(len(engine.parts.capacities)):
        engine.set_level(level)
        levels.append(tuple(engine.parts.swapper.rungs))
        for layer, rung in enumerate(levels[-1]):
            if (layer, rung) not in dequantized:
                dequantized[layer, rung] = weights_of(engine, layer)
    engine.set_level(0)
    return Oracle(folder, lambda layer, rung: dequantized[layer, rung], stored, levels)
