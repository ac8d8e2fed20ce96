"""What a phase of gpu.py has at hand, and how large it measures."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from engine_driver import Driver
from memory_watch import Memory
from roofline import Roofline

from morph_runtime.engine.core import Engine


@dataclass(frozen=True)
class Scale:
    """Sizes of what is measured."""

    batches: tuple[int, ...] = (1, 3, 8, 32, 37, 64, 128, 200, 256)
    prompt: int = 128
    output: int = 128
    full_batches: tuple[int, ...] = (8, 32, 64)
    prompts: tuple[int, ...] = (32, 128, 512, 2048, 8192)
    mixed_decodes: int = 64
    """Beside chunks that fill the step up."""
    mixed_steps: int = 24
    batch: int = 64
    """Sequences that decode while layers change, and of all other phases."""
    batches_plain: tuple[int, ...] = (64, 256)
    one_by_one: int = 10
    """Layers that change alone, one after the other."""
    swing: int = 10
    """Layers of a paced walk."""
    paced_steps: int = 380
    check_rows: tuple[int, ...] = (1, 64, 2048)
    copy_mib: int = 256


SMALL = Scale(
    batches=(1, 3, 8), prompt=16, output=16, full_batches=(8, 12), prompts=(8, 32, 8192), mixed_decodes=8,
    mixed_steps=3, batch=8, batches_plain=(4,), one_by_one=3, swing=2, paced_steps=40, check_rows=(1, 8), copy_mib=8,
)  # fmt: skip
"""To try everything out on a CPU."""


@dataclass
class Bench:
    """The engine that is measured."""

    engine: Engine
    woken: threading.Event
    """Set whenever a thread of the engine's has done something."""
    driver: Driver
    roofline: Roofline
    memory: Memory
    scale: Scale
    levels: dict[str, int]
    """The level at which all layers have a rung, by rung."""
    longest: int
    """Tokens of a request."""
    result: dict[str, Any]

    @property
    def layers(self) -> int:
        """Of the model."""
        return self.engine.parts.spec.layers

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step."""
        return self.engine.parts.config.scheduler.max_num_batched_tokens
