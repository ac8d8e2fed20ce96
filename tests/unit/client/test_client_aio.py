from __future__ import annotations

import asyncio
import gc

import pytest
from client_fakes import FakeTriton

from morph_client import (
    AsyncMorphClient,
    BadInput,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    MorphError,
    QueueFull,
    QueueTimeout,
    SamplingParams,
    ServerError,
    ServerUnavailable,
)


def connect(triton: FakeTriton) -> AsyncMorphClient:
    return AsyncMorphClient(triton.url, metrics_url=triton.metrics_url)


async def cancelled_on_server(triton: FakeTriton) -> bool:
    return await asyncio.to_thread(triton.service.cancelled.acquire, timeout=60)


async def arrived_on_server(triton: FakeTriton) -> bool:
    return await asyncio.to_thread(triton.service.arrived.acquire, timeout=60)


async def test_a_stream_yields_text_tokens_and_levels(triton: FakeTriton) -> None:
    async with connect(triton) as client:
        chunks = [c async for c in client.stream("say it", sampling=SamplingParams(max_tokens=3), slo_class="gold")]
    assert [c.text for c in chunks] == ["w0 ", "w1 ", "w2 "] and chunks[-1].finish_reason == "length"
    sent = triton.service.requests[0]
    assert sent.parameters["slo_class"].string_param == "gold"


async def test_each_of_n_outputs_is_returned(triton: FakeTriton) -> None:
    async with AsyncMorphClient(triton.url) as client:
        answer = await client.generate("say it", sampling=SamplingParams(max_tokens=2, n=2))
    assert [output.text for output in answer.outputs] == ["w0 w1 ", "1:w0 1:w1 "]


async def test_generate_returns_the_whole_answer(triton: FakeTriton) -> None:
    async with connect(triton) as client:
        answer = await client.generate("bare", sampling=SamplingParams(max_tokens=4))
    assert answer.text == "w0 w1 w2 w3 " and 0 < answer.ttft_s < answer.e2e_s


@pytest.mark.parametrize("how", ["", " as-a-status"])
@pytest.mark.parametrize(
    ("word", "kind"), [("refuse", InvalidRequest), ("full", QueueFull), ("late", QueueTimeout), ("dropped", Cancelled)]
)
async def test_an_error_is_raised_as_its_class(triton: FakeTriton, word: str, how: str, kind: type[MorphError]) -> None:
    async with connect(triton) as client:
        with pytest.raises(kind):
            await client.generate(word + how)


async def test_a_cut_stream_and_a_deadline_are_errors(triton: FakeTriton) -> None:
    async with connect(triton) as client:
        with pytest.raises(ServerError):
            await client.generate("cut")
        with pytest.raises(DeadlineExceeded):
            await client.generate("hang", deadline_s=0.2)


async def test_cancelling_the_task_cancels_on_the_server(triton: FakeTriton) -> None:
    async with connect(triton) as client:
        task = asyncio.create_task(client.generate("hang"))
        assert await arrived_on_server(triton)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await cancelled_on_server(triton)


async def test_leaving_the_with_block_cancels_on_the_server(triton: FakeTriton) -> None:
    async with connect(triton) as client:
        async with client.stream("slow", sampling=SamplingParams(max_tokens=1000)) as chunks:
            await anext(chunks)
        assert await cancelled_on_server(triton)
        assert [c async for c in chunks] == []


@pytest.mark.parametrize("ends", ["refuse lingering", "full lingering", "say it lingering"])
async def test_a_stream_that_is_ending_is_left_to_end(triton: FakeTriton, ends: str) -> None:
    """Cancelled at that moment it can crash Triton 2.51."""
    async with connect(triton) as client:
        async with client.stream(ends, sampling=SamplingParams(max_tokens=2)) as chunks:
            try:
                while not (await anext(chunks)).finish_reason:
                    pass
            except MorphError:
                assert "say" not in ends
        assert triton.service.answered == 1
        assert [c async for c in chunks] == []


async def test_no_header_asks_for_what_crashes_triton(triton: FakeTriton) -> None:
    async with connect(triton) as client:
        await client.generate("say it")
    assert not [name for name in triton.service.headers[0] if name.startswith("triton")]


async def test_dropping_a_stream_half_read_cancels_on_the_server(triton: FakeTriton) -> None:
    async with connect(triton) as client:
        async for _ in client.stream("slow", sampling=SamplingParams(max_tokens=1000)):
            break
        gc.collect()
        assert await cancelled_on_server(triton)


async def test_cancel_reaches_the_reader_as_an_error_of_ours(triton: FakeTriton) -> None:
    async with connect(triton) as client:
        chunks = client.stream("hang")
        asyncio.get_running_loop().call_later(0.1, chunks.cancel)
        with pytest.raises(Cancelled, match="by this client"):
            await anext(chunks)


async def test_many_requests_at_once_leave_no_task_behind(triton: FakeTriton) -> None:
    async with AsyncMorphClient(triton.url, connections=2) as client:
        sampling = SamplingParams(max_tokens=5)
        answers = await asyncio.gather(*(client.generate("x", sampling=sampling) for _ in range(60)))
    assert {a.text for a in answers} == {"w0 w1 w2 w3 w4 "}
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_readiness_metrics_and_a_missing_server(triton: FakeTriton) -> None:
    async with connect(triton) as client:
        assert await client.server_ready()
        assert (await client.metrics()).get("morph_level") == 0
    async with AsyncMorphClient("localhost:9") as nobody:
        assert not await nobody.server_ready()
        with pytest.raises(ServerUnavailable, match="morph serve"):
            await nobody.generate("x")
    with pytest.raises(BadInput):
        AsyncMorphClient(connections=0)
