"""Every piece of a step that a GPU's runner asks for has been captured, in the room that the step needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from morph_runtime.engine import cuda_runner
from morph_runtime.engine.cuda_attention import Room, rooms
from morph_runtime.engine.cuda_graphs import ROOMS_BYTES, next_size
from morph_runtime.engine.cuda_runner import CudaRunner
from morph_runtime.kernels.rung import Rung

RUNGS: tuple[Rung, ...] = ("full", "w8", "w4")
SEQUENCES, TOKENS = 256, 2048


@dataclass(frozen=True)
class Layer:
    layer: int
    rung: Rung


class Graphs:
    """Keeps the work of each key; a replay notes it."""

    def __init__(self) -> None:
        self.works: dict[tuple[object, ...], Any] = {}
        self.replayed: list[tuple[object, ...]] = []

    def capture(self, key: tuple[object, ...], stream: object, work: Callable[[], object]) -> None:
        assert key not in self.works
        self.works[key] = work

    def replay(self, key: tuple[object, ...]) -> None:
        assert key in self.works
        self.replayed.append(key)


def runner_of(layers: Sequence[Layer], monkeypatch: pytest.MonkeyPatch) -> tuple[CudaRunner, Graphs]:
    monkeypatch.setattr(cuda_runner, "RESULTS", 0)  # pinned memory needs a GPU
    pieces: Any = SimpleNamespace(
        sampled=range(SEQUENCES), max_tokens=TOKENS, attention=SimpleNamespace(rooms=lambda n: rooms(n, SEQUENCES))
    )
    for name in (
        "embed", "decode_layer", "decode_step", "head", "layer", "last_attention", "step", "tail", "choose_shaped",
    ):  # fmt: skip
        setattr(pieces, name, lambda *_: None)
    graphs, swapper, unused, bind = (Graphs(), SimpleNamespace(layers=layers), None, Layer)  # type: Any, Any, Any, Any
    runner = CudaRunner(pieces, unused, swapper, unused, (), graphs, len(RUNGS))
    runner.capture(unused, bind, RUNGS)
    return runner, graphs


@pytest.mark.parametrize("count", [2, 100], ids=["two rooms", "two rooms at one size"])
def test_every_graph_that_a_step_needs_is_there(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for turn in range(2 * len(RUNGS)):
        layers = [Layer(at, RUNGS[(turn + (at >= count // 2)) % len(RUNGS)]) for at in range(count)]
        runner, graphs = runner_of(layers, monkeypatch)
        rung = layers[0].rung
        for size in runner.mixed_step_sizes:
            for usual in (True, False):
                runner._step(size, None, usual, 7)
        for size in runner.step_sizes:
            runner._step(size, rung, True, 7)
        for rows in range(1, SEQUENCES + 1):
            for uniform in (rung, None):
                runner._decode(runner._decode_size(rows, uniform), uniform)
            graphs.replay(("shaped", next_size(runner._row_sizes, rows)))
        assert len(graphs.replayed) > 1000


def test_layers_of_a_step_come_in_the_room_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Layer(at, "full" if at else "w8") for at in range(4)]
    runner, graphs = runner_of(layers, monkeypatch)
    for usual, room in ((True, rooms(TOKENS, SEQUENCES)[0]), (False, Room(SEQUENCES, SEQUENCES))):
        graphs.replayed.clear()
        runner._step(TOKENS, None, usual, 0)
        used = [key for key in graphs.replayed if key[-1] != "embed"]
        assert len(used) == len(layers)
        assert {key[2] for key in used} == {room}
        assert {graphs.works[key].args[1] for key in used} == {room}


def test_second_rooms_stay_within_their_memory_for_a_model_of_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rooms at the largest sizes, one at the others."""
    _, graphs = runner_of([Layer(at, "full") for at in range(80)], monkeypatch)
    by_size: dict[object, set[object]] = {}
    for key in graphs.works:
        if key[0] == "step" and len(key) == 5:
            by_size.setdefault(key[1], set()).add(key[2])
    found = [len(by_size[size]) for size in sorted(by_size, key=lambda size: int(str(size)))]
    assert found == sorted(found)
    assert 1 in found
    assert 2 in found
    second = sum(1 for count in found if count == 2) * 80 * len(RUNGS)
    assert second * 100_000 < ROOMS_BYTES
