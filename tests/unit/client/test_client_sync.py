from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
from client_fakes import FakeTriton

from morph_client import (
    BadInput,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    MorphClient,
    MorphError,
    QueueFull,
    QueueTimeout,
    SamplingParams,
    ServerError,
    ServerUnavailable,
)


@pytest.fixture
def client(triton: FakeTriton) -> Iterator[MorphClient]:
    with MorphClient(triton.url, metrics_url=triton.metrics_url) as one:
        yield one


def test_a_stream_yields_text_tokens_and_levels(client: MorphClient) -> None:
    chunks = list(client.stream("say it", sampling=SamplingParams(max_tokens=3)))
    assert [c.text for c in chunks] == ["w0 ", "w1 ", "w2 "]
    assert [c.finish_reason for c in chunks] == [None, None, "length"]
    assert chunks[0].levels == (0,) and [c.num_input_tokens for c in chunks] == [2, None, 2]
    assert 0 < chunks[0].arrival_s <= chunks[-1].arrival_s


def test_each_of_n_outputs_is_returned(client: MorphClient) -> None:
    answer = client.generate("say it", sampling=SamplingParams(max_tokens=2, n=3))
    assert [output.text for output in answer.outputs] == ["w0 w1 ", "1:w0 1:w1 ", "2:w0 2:w1 "]
    assert {output.num_output_tokens for output in answer.outputs} == {2}
    assert all(len(output.token_arrivals_s) == 2 and output.levels == (0, 0) for output in answer.outputs)
    chunk = next(iter(client.stream("say it", sampling=SamplingParams(max_tokens=2, n=2))))
    assert [output.text for output in chunk.outputs] == ["w0 ", "1:w0 "]


def test_generate_returns_the_whole_answer_with_its_times(client: MorphClient) -> None:
    answer = client.generate("say it", sampling=SamplingParams(max_tokens=4))
    assert answer.text == "w0 w1 w2 w3 " and answer.num_output_tokens == 4
    assert 0 < answer.ttft_s < answer.e2e_s and len(answer.token_arrivals_s) == 4


def test_an_empty_final_response_is_no_chunk(client: MorphClient) -> None:
    chunks = list(client.stream("bare", sampling=SamplingParams(max_tokens=2)))
    assert [c.text for c in chunks] == ["w0 ", "w1 "]


@pytest.mark.parametrize("how", ["", " as-a-status"])
@pytest.mark.parametrize(
    ("word", "kind"), [("refuse", InvalidRequest), ("full", QueueFull), ("late", QueueTimeout), ("dropped", Cancelled)]
)
def test_an_error_is_raised_as_its_class_with_the_servers_words(
    client: MorphClient, word: str, how: str, kind: type[MorphError]
) -> None:
    with pytest.raises(kind) as caught:
        client.generate(word + how)
    assert str(caught.value) and "request id" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "kind"),
    [("dead", ServerUnavailable), ("broken", ServerError), ("nonsense", ServerError), ("cut", ServerError)],
)
def test_a_failing_server_is_told_from_a_bad_request(client: MorphClient, word: str, kind: type[MorphError]) -> None:
    with pytest.raises(kind):
        client.generate(word)


def test_a_deadline_ends_a_request_that_hangs(client: MorphClient, triton: FakeTriton) -> None:
    for deadline_s in (0.2, 2, 20):  # on a busy machine a short one is over before the server has heard of the request
        with pytest.raises(DeadlineExceeded):
            client.generate("hang", deadline_s=deadline_s)
        if triton.service.arrived.acquire(timeout=0.2):
            break
    assert triton.service.cancelled.acquire(timeout=60)


def test_leaving_the_with_block_cancels_on_the_server(client: MorphClient, triton: FakeTriton) -> None:
    with client.stream("slow", sampling=SamplingParams(max_tokens=1000)) as chunks:
        next(chunks)
    assert triton.service.cancelled.acquire(timeout=60)
    assert list(chunks) == []


@pytest.mark.parametrize("ends", ["refuse lingering", "full lingering", "say it lingering"])
def test_a_stream_that_is_ending_is_left_to_end(client: MorphClient, triton: FakeTriton, ends: str) -> None:
    """Cancelled at that moment it can crash Triton 2.51."""
    with client.stream(ends, sampling=SamplingParams(max_tokens=2)) as chunks:
        try:
            while not next(chunks).finish_reason:
                pass
        except MorphError:
            assert "say" not in ends
    assert triton.service.answered == 1
    assert list(chunks) == []


def test_no_header_asks_for_what_crashes_triton(client: MorphClient, triton: FakeTriton) -> None:
    client.generate("say it")
    assert not [name for name in triton.service.headers[0] if name.startswith("triton")]


def test_headers_go_with_each_question(triton: FakeTriton) -> None:
    with MorphClient(triton.url, headers={"x-key": "abc"}) as one:
        assert one.server_ready() and one.generate("say it").text
    assert [headers["x-key"] for headers in triton.service.headers] == ["abc", "abc"]


def test_dropping_a_stream_half_read_cancels_on_the_server(client: MorphClient, triton: FakeTriton) -> None:
    for _ in client.stream("slow", sampling=SamplingParams(max_tokens=1000)):
        break
    gc.collect()
    assert triton.service.cancelled.acquire(timeout=60)


def test_another_thread_can_cancel(client: MorphClient, triton: FakeTriton) -> None:
    chunks = client.stream("hang")

    def cancel() -> None:
        triton.service.arrived.acquire(timeout=60)
        chunks.cancel()

    threading.Thread(target=cancel).start()
    with pytest.raises(Cancelled, match="by this client"):
        next(chunks)
    assert triton.service.cancelled.acquire(timeout=60)


def test_many_threads_share_a_client_and_leave_nothing_behind(triton: FakeTriton) -> None:
    texts: list[str] = []
    before = threading.enumerate()
    with MorphClient(triton.url, connections=2) as client:
        threads = [
            threading.Thread(
                target=lambda: texts.append(client.generate("x", sampling=SamplingParams(max_tokens=5)).text)
            )
            for _ in range(40)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
    assert texts == ["w0 w1 w2 w3 w4 "] * 40
    # The fake server's own threads stay; what must go is what this side started.
    foreign = ("ThreadPoolExecutor", "process_request", "serve_forever")
    mine = [t for t in threading.enumerate() if t not in before and not any(name in t.name for name in foreign)]
    for thread in mine:
        thread.join(100)
    assert not any(thread.is_alive() for thread in mine)


def test_closing_the_client_ends_its_streams_and_refuses_new_ones(triton: FakeTriton) -> None:
    client = MorphClient(triton.url)
    chunks = client.stream("hang")
    threading.Timer(0.1, client.close).start()
    with pytest.raises(Cancelled):
        next(chunks)
    with pytest.raises(Cancelled, match="closed"):
        client.generate("x")


def test_readiness_and_metrics(client: MorphClient, triton: FakeTriton) -> None:
    assert client.server_ready()
    assert not MorphClient(triton.url, model="other").server_ready()
    assert client.metrics().get("morph_level_max", model="morph") == 8


def test_without_a_server_the_remedy_is_named() -> None:
    with MorphClient("localhost:9", metrics_url="http://localhost:9/metrics") as client:
        assert not client.server_ready()
        with pytest.raises(ServerUnavailable, match="morph serve"):
            client.generate("x")
        with pytest.raises(ServerUnavailable, match="metrics page"):
            client.metrics()


def test_an_impossible_number_of_connections_is_refused() -> None:
    with pytest.raises(BadInput):
        MorphClient(connections=0)
