"""The whole engine on a GPU, on tiny models: against the CPU's engine, and against itself with optimisations off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.conftest import make_model, run_all, submit
from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine
from morph_runtime.engine.cuda_runner import Enqueued
from morph_runtime.engine.runner import Launched


@pytest.fixture(scope="module", params=[2, 4], ids=["gqa", "mha"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), kv_heads=request.param)


class Engines:
    """Makes engines and closes them."""

    def __init__(self) -> None:
        self.made: list[Engine] = []

    def make(self, folder: Path, device: str = "cuda", dtype: str = "float32", **changes: Any) -> Engine:
        values: dict[str, Any] = {
            "device": device,
            "model": {"path": str(folder), "dtype": dtype},
            "memory": {"kv_tokens": 512, "block_tokens": 16},
            "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 48},
            "morph": {"mode": "off", "ladder": ["w8", "w4"], "costs": "off"},
            "kernels": {"threads": 1},
            "check_integrity": True,
        }
        for name, change in changes.items():
            values[name] = {**values[name], **change} if isinstance(change, dict) else change
        self.made.append(build_engine(EngineConfig.from_mapping(values)))
        return self.made[-1]


@pytest.fixture
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    for engine in made.made:
        engine.close()


def outputs(engine: Engine, temperature: float = 0.0) -> dict[int, list[int]]:
    for key in range(6):
        prompt = [(7 * key + 3 * i) % 190 + 1 for i in range(5 + 9 * key)]
        submit(engine, key, prompt, 20, temperature=temperature, seed=key)
    return run_all(engine)


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("graphs", [True, False])
def test_in_float32_it_gives_the_tokens_of_the_cpu(model: Path, engines: Engines, graphs: bool, overlap: str) -> None:
    cpu, gpu = engines.make(model, "cpu"), engines.make(model, kernels={"graphs": graphs}, overlap=overlap)
    assert outputs(gpu) == outputs(cpu)


@pytest.mark.parametrize("level", [0, 2, 4, 6, 8])
def test_graphs_change_no_token_at_any_level(model: Path, engines: Engines, level: int) -> None:
    """One request at a time, so that both pad to the same number of rows."""
    tokens = []
    for graphs in (True, False):
        engine = engines.make(model, dtype="bfloat16", kernels={"graphs": graphs})
        engine.set_level(level)
        submit(engine, 1, [5, 9, 23, 7] * 5, 40)
        tokens.append(run_all(engine)[1])
    assert tokens[0] == tokens[1]


def test_seeded_draws_repeat_whatever_else_is_in_the_batch(model: Path, engines: Engines) -> None:
    engine = engines.make(model, dtype="float32")
    together = outputs(engine, temperature=1.0)
    submit(engine, 3, [(7 * 3 + 3 * i) % 190 + 1 for i in range(5 + 9 * 3)], 20, temperature=1.0, seed=3)
    assert run_all(engine)[3] == together[3]


def test_a_seeded_row_draws_the_same_beside_rows_that_the_host_samples(model: Path, engines: Engines) -> None:
    engine = engines.make(model, dtype="float32")
    tokens = []
    for beside in (False, True):
        submit(engine, 1, [9, 4, 17] * 6, 20, temperature=1.0, seed=11)
        if beside:
            submit(engine, 2, [8] * 30, 20, temperature=0.8, presence_penalty=0.5, seed=3)
        tokens.append(run_all(engine)[1])
    assert tokens[0] == tokens[1]


def weights_of(engine: Engine) -> list[bytes]:
    """Every field of every layer; between fields a slot may hold anything."""
    swapper = engine.parts.swapper
    fields = []
    for layer, rung in enumerate(swapper.rungs):
        views = swapper._slots.layout(rung).views(swapper.slot_bytes_of(layer))
        fields += [view.contiguous().view(torch.uint8).cpu().numpy().tobytes() for view in views.values()]
    return fields


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_bit_equal_after_any_walk(model: Path, engines: Engines, dtype: str) -> None:
    engine = engines.make(model, dtype=dtype)
    by_level = {}
    for level in (0, 3, 4, 8, 5, 4, 1, 0, 8, 4, 3, 0):
        engine.set_level(level)
        engine.check_integrity()
        assert engine.parts.pool.capacity == engine.parts.capacities[level]
        assert weights_of(engine) == by_level.setdefault(level, weights_of(engine))


def test_kv_content_survives_growth_shrinking_and_migration(model: Path, engines: Engines) -> None:
    engine = engines.make(model, memory={"kv_tokens": 1024})
    parts = engine.parts
    top = len(parts.capacities) - 1
    engine.set_level(top)
    base = parts.capacities[0]
    blocks = parts.pool.allocate(parts.pool.num_free)
    keep = blocks[-4:]
    for block in keep:
        parts.cache.k(0)[block].fill_(block)
        parts.cache.v(3)[block].fill_(-block)
    parts.pool.free(blocks[:-4])
    before = parts.cache.digest(keep)
    pairs: dict[int, int] = {}
    parts.resizer._remap = pairs.update
    engine.set_level(0)
    assert parts.pool.capacity == base
    assert set(pairs) == {block for block in keep if block >= base}, "the test needs live blocks in the tail"
    assert parts.cache.digest([pairs.get(block, block) for block in keep]) == before
    parts.pool.free([pairs.get(block, block) for block in keep])


@pytest.mark.parametrize("graphs", [True, False])
def test_requests_run_to_their_end_while_levels_change_every_few_steps(
    model: Path, engines: Engines, graphs: bool
) -> None:
    engine = engines.make(model, dtype="bfloat16", kernels={"graphs": graphs})
    for key in range(6):
        submit(engine, key, [key + 1] * 20, 60)

    def aim(step: int) -> None:
        if step % 3 == 0:
            engine.parts.shifter.target = step * 5 % 9

    assert [len(tokens) for tokens in run_all(engine, between=aim).values()] == [60] * 6
    assert engine.parts.shifter.counters.down > 0 < engine.parts.shifter.counters.up


def test_rows_that_only_the_host_can_sample_run_beside_plain_ones(model: Path, engines: Engines) -> None:
    engine = engines.make(model)
    cpu = engines.make(model, "cpu")
    for one in (engine, cpu):
        submit(one, 1, [5] * 10, 12)
        submit(one, 2, [6] * 30, 12, repetition_penalty=1.2)
        submit(one, 3, [7] * 30, 12, temperature=0.8, frequency_penalty=0.1, seed=3)
        submit(one, 4, [8] * 30, 12, logprobs=3)
    on_gpu, on_cpu = run_all(engine), run_all(cpu)
    assert [on_gpu[key] for key in (1, 2, 4)] == [on_cpu[key] for key in (1, 2, 4)]
    assert len(on_gpu[3]) == 12


SHAPED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"temperature": 1.0, "top_k": 20, "min_p": 0.01, "seed": 4},
    {"temperature": 0.0, "min_tokens": 12, "ignore_eos": False}, {"temperature": 0.0, "logit_bias": ((7, 4.0),)},
    {"temperature": 1.0, "top_p": 0.5, "bad_word_ids": ((5,), (6,)), "seed": 5}, {"temperature": 1.0, "seed": 6},
)  # fmt: skip


def shaped_outputs(engine: Engine, beside: bool = False) -> list[list[int]]:
    for key, choice in enumerate(SHAPED):
        submit(engine, key, [(7 * key + 3 * i) % 190 + 1 for i in range(5 + 4 * key)], 20, **choice)
    if beside:
        submit(engine, 90, [8] * 30, 20, logprobs=3)
    found = run_all(engine)
    return [found[key] for key in range(len(SHAPED))]


def test_rows_with_top_p_bans_and_the_like_give_the_same_tokens_with_and_without_graphs_and_overlap(
    model: Path, engines: Engines
) -> None:
    made = [
        engines.make(model, kernels={"graphs": graphs}, overlap=overlap)
        for graphs in (True, False) for overlap in ("on", "off")
    ]  # fmt: skip
    outputs_of = [shaped_outputs(engine) for engine in made]
    assert all(found == outputs_of[0] for found in outputs_of)
    assert shaped_outputs(made[0]) == outputs_of[0], "a seed draws anew"
    cpu = shaped_outputs(engines.make(model, "cpu"))
    assert [outputs_of[0][at] for at in (2, 3)] == [cpu[at] for at in (2, 3)]


@pytest.mark.parametrize("level", [0, 3, 8])
def test_graphs_change_no_token_of_a_shaped_row_at_any_level(model: Path, engines: Engines, level: int) -> None:
    """One request at a time, so that both pad to the same number of rows."""
    tokens = []
    for graphs in (True, False):
        engine = engines.make(model, dtype="bfloat16", kernels={"graphs": graphs})
        engine.set_level(level)
        for key, choice in enumerate(SHAPED):
            submit(engine, key, [5, 9, 23, key + 1] * 5, 20, **choice)
            tokens.append((graphs, run_all(engine)[key]))
    assert [found for graphs, found in tokens if graphs] == [found for graphs, found in tokens if not graphs]


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=["top_k", "top_p", "min_p"])
@pytest.mark.parametrize("level", [0, 3])
def test_a_draw_that_may_take_one_token_alone_is_the_greedy_one(
    model: Path, engines: Engines, choice: dict[str, Any], level: int
) -> None:
    engine, prompt = engines.make(model), [5, 9, 23] * 6
    engine.set_level(level)
    submit(engine, 1, prompt, 20)
    submit(engine, 2, prompt, 20, temperature=1.5, seed=3, **choice)
    submit(engine, 3, prompt, 20, temperature=1.5, seed=3)
    found = run_all(engine)
    assert found[2] == found[1] and found[3] != found[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seed_gives_the_same_tokens_with_and_without_log_probabilities(
    model: Path, engines: Engines, dtype: str
) -> None:
    """Who asks for log probabilities is sampled by the host. One at a time: a batch's shape may decide the rounding."""
    engine, prompt = engines.make(model, dtype=dtype), [5, 9, 23] * 6
    for key, choice in enumerate(SHAPED):
        found = []
        for more in ({}, {"logprobs": 1}):
            submit(engine, key, prompt, 20, **choice, **more)
            found.append(run_all(engine)[key])
        assert found[0] == found[1], choice


def test_a_shaped_row_draws_the_same_beside_rows_that_the_host_samples(model: Path, engines: Engines) -> None:
    engine = engines.make(model)
    assert shaped_outputs(engine) == shaped_outputs(engine, beside=True)


def test_the_host_does_not_wait_for_shaped_rows(model: Path, engines: Engines) -> None:
    engine = engines.make(model)
    runner, kinds = engine.parts.runner, set()
    launch = runner.launch

    def watched(*arguments: Any) -> Launched:
        torch.cuda.set_sync_debug_mode("error")
        try:
            launched = launch(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        kinds.add(type(launched))
        return launched

    runner.launch = watched  # type: ignore[method-assign]
    shaped_outputs(engine)
    assert kinds == {Enqueued}


def test_nothing_ends_before_its_minimum(model: Path, engines: Engines) -> None:
    engine = engines.make(model)
    prompt = [11, 29, 3] * 5
    submit(engine, 1, prompt, 20)
    first = run_all(engine)[1][0]
    submit(engine, 2, prompt, 20, stop_token_ids=(first,))
    submit(engine, 3, prompt, 20, stop_token_ids=(first,), min_tokens=6)
    found = run_all(engine)
    assert found[2] == [first] and len(found[3]) >= 6 and first not in found[3][:6]
