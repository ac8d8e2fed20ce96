from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from client_fakes import FakeTriton
from hypothesis import given, settings
from hypothesis import strategies as st

from morph_client import AsyncMorphClient, BadInput
from morph_client.demo_load import DemoLoad, quick_load
from morph_client.loadgen import Planned, Progress, plan_requests, run_load
from morph_client.prompts import PromptMaker, measure_tokens_per_word, words_of
from morph_client.sampler import Samples, sample_until
from morph_client.traces import TraceRequest


async def test_every_planned_request_gets_a_record_in_order(triton: FakeTriton) -> None:
    triton.service.level = 2
    plan = [Planned(0.02 * i, "full" if i == 3 else "word " * 4, 4, 3) for i in range(6)]
    progress = Progress()
    async with AsyncMorphClient(triton.url) as client:
        records = await run_load(client, plan, progress=progress)
    assert [r.index for r in records] == list(range(6))
    assert [r.error is None for r in records] == [True, True, True, False, True, True]
    good = records[0]
    assert good.output_tokens == 3 and good.prompt_tokens == 4 and good.level0_tokens == 0 and good.max_level == 2
    assert good.rung_share is not None and good.rung_share.w4 == 0.25
    assert (progress.sent, progress.done, progress.errors, progress.output_tokens) == (6, 6, 1, 15)


async def test_requests_go_out_when_due_though_earlier_ones_hang(triton: FakeTriton) -> None:
    plan = [Planned(0.0, "hang", 1, 1), Planned(0.1, "word", 1, 1), Planned(0.2, "word", 1, 1)]
    async with AsyncMorphClient(triton.url) as client:
        running = asyncio.create_task(run_load(client, plan))
        for _ in plan:
            assert await asyncio.to_thread(triton.service.arrived.acquire, timeout=60)
        for hanging in triton.service.hanging:
            hanging.set()
        records = await running
    assert records[0].error is not None and records[1].error is None
    assert all(r.sent_s >= r.due_s for r in records)


async def test_cancelling_a_run_cancels_its_requests_on_the_server(triton: FakeTriton) -> None:
    async with AsyncMorphClient(triton.url) as client:
        task = asyncio.create_task(run_load(client, [Planned(0, "hang", 1, 1), Planned(60, "x", 1, 1)]))
        assert await asyncio.to_thread(triton.service.arrived.acquire, timeout=60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(triton.service.cancelled.acquire, timeout=60)


async def test_output_length_is_forced(triton: FakeTriton) -> None:
    async with AsyncMorphClient(triton.url) as client:
        await run_load(client, [Planned(0, "x", 1, 7)])
    request = triton.service.requests[0]
    sent = dict(zip((tensor.name for tensor in request.inputs), request.raw_input_contents, strict=True))
    for part in (b'"max_tokens": 7', b'"ignore_eos": true'):
        assert part in sent["sampling_parameters"]
    assert b"min_tokens" not in sent["sampling_parameters"], "such rows leave the fast path of a GPU's sampler"


async def test_the_sampler_collects_states_and_counts_failures(triton: FakeTriton) -> None:
    stop, samples = asyncio.Event(), Samples()

    def enough(_state: object) -> None:
        if len(samples.states) == 3:
            stop.set()

    await sample_until(stop, samples, metrics_url=triton.metrics_url, interval_s=0.02, on_sample=enough)
    assert [s.state.level for s in samples.states] == [0, 0, 0] and samples.failures == 0
    times = [s.at_s for s in samples.states]
    assert times == sorted(times)
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, stop.set)
    await sample_until(stop, samples, metrics_url="http://localhost:9/metrics", interval_s=0.02)
    assert samples.failures > 0 and samples.last_failure is not None


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(min_value=1, max_value=3000), st.integers(min_value=0, max_value=500))
def test_a_prompt_has_about_the_wanted_length_and_its_own_beginning(tokens: int, index: int) -> None:
    maker = PromptMaker(words_of(None), 1.5, seed=1)
    prompt = maker.make(tokens, index)
    assert len(prompt.split()) == max(1, round(tokens / 1.5))
    assert prompt == maker.make(tokens, index)
    if tokens > 6:
        assert prompt.split()[:2] != maker.make(tokens, index + 1).split()[:2]


async def test_tokens_per_word_are_measured_on_samples_from_all_over_the_text(triton: FakeTriton) -> None:
    async with AsyncMorphClient(triton.url) as client:
        assert await measure_tokens_per_word(client, words_of(None)) == pytest.approx(1.0)
    assert len(triton.service.requests) == 6


def test_the_prompt_text_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two\nthree")
    assert words_of(path) == ["one", "two", "three"]
    path.write_text("  \n")
    for wrong in (path, tmp_path / "absent.txt"):
        with pytest.raises(BadInput):
            words_of(wrong)
    with pytest.raises(BadInput):
        PromptMaker(["a"], 0.0, 0)
    with pytest.raises(BadInput):
        PromptMaker([], 1.0, 0)


def test_a_plan_keeps_times_and_lengths() -> None:
    plan = plan_requests([TraceRequest(1.5, 20, 4)], PromptMaker(["a", "b"], 1.0, 0))
    assert plan[0].due_s == 1.5 and plan[0].output_tokens == 4 and len(plan[0].prompt.split()) == 20


@pytest.mark.parametrize("load", [DemoLoad(), quick_load(), DemoLoad().lasting(3)])
def test_the_demo_load_is_low_high_low_and_repeatable(load: DemoLoad) -> None:
    requests = load.requests()
    assert requests == load.requests()
    low, high, after = load.spans
    assert high.busy and not low.busy and not after.busy
    assert (low.start_s, low.end_s, high.end_s) == (0, high.start_s, after.start_s)
    assert after.end_s == pytest.approx(load.seconds)
    assert all(0 <= r.arrival_s < load.seconds for r in requests)
    assert all(load.prompt_tokens[0] <= r.prompt_tokens <= load.prompt_tokens[1] for r in requests)
    burst = sum(high.start_s <= r.arrival_s < high.end_s for r in requests)
    assert burst > len(requests) / 2


def test_a_load_of_no_length_is_refused() -> None:
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(BadInput):
            DemoLoad().lasting(seconds)
    assert DemoLoad(low_rate_per_s=1e-9, high_rate_per_s=1e-9).requests()


def test_the_demo_fixes_the_servers_kv_cache_but_the_user_wins() -> None:
    load = DemoLoad(kv_tokens=1024)
    assert load.server_environment({"A": "b"}) == {"A": "b", "MORPH_KV_TOKENS": "1024"}
    assert load.server_environment({"MORPH_KV_TOKENS": "4096"})["MORPH_KV_TOKENS"] == "4096"


def test_the_burst_asks_for_more_than_full_precision_serves_and_the_quiet_for_less() -> None:
    load = DemoLoad().for_machine(4.0)
    assert load.low_rate_per_s < 4.0 < load.high_rate_per_s
    assert load.kv_tokens == DemoLoad().kv_tokens
