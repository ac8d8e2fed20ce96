"""The product as it ships: the repository's model, the real engine, the demo model."""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from triton_server import TritonServer, real_repository
from wire_client import GrpcStream, generate, open_sse, post, sse, sse_events, text_of, until

pytestmark = pytest.mark.triton


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[TritonServer]:
    server = TritonServer(tmp_path, {"MORPH_MAX_NUM_SEQS": "4"})
    try:
        yield server.wait_ready(120).wait_metrics()
    finally:
        server.stop()


def test_greedy_text_is_the_same_on_every_way(real: TritonServer) -> None:
    whole = generate(real, "Once upon a time", max_tokens=24, temperature=0)["text_output"]
    assert len(whole) > 20
    assert "".join(e["text_output"] for e in sse(real, "Once upon a time", max_tokens=24, temperature=0)) == whole
    assert text_of(GrpcStream(real).ask("Once upon a time", {"max_tokens": 24, "temperature": 0}).rest()) == whole


def test_a_stop_string_cuts_the_same_text(real: TritonServer) -> None:
    whole = generate(real, "Once upon a time", max_tokens=24, temperature=0)["text_output"]
    stop = whole[7:10]
    cut = generate(real, "Once upon a time", max_tokens=24, temperature=0, stop=[stop])["text_output"]
    assert cut == whole[: whole.index(stop)]


def test_more_requests_than_sequences_all_end(real: TritonServer) -> None:
    streams = [GrpcStream(real).ask("The sea", {"max_tokens": 16, "temperature": 0}) for _ in range(16)]
    texts = {text_of(stream.rest(100)) for stream in streams}
    assert not any(stream.responses[-1].error for stream in streams)
    assert all(texts)


def test_levels_and_tokens_are_reported(real: TritonServer) -> None:
    responses = GrpcStream(real).ask(
        "The sea", {"max_tokens": 16}, return_morph_level=True, return_num_output_tokens=True
    ).rest(100)  # fmt: skip
    assert sum(r.outputs["num_output_tokens"][0] for r in responses) == sum(
        len(r.outputs["morph_level"]) for r in responses
    )


def test_structured_outputs_and_log_probabilities_are_on_the_wire(real: TritonServer) -> None:
    sampling = {"max_tokens": 40, "logprobs": 2, "structured_outputs": {"choice": ["a small boat", "the deep sea"]}}
    responses = GrpcStream(real).ask(
        "Which is it? ", sampling, return_logprobs=True, return_cumulative_logprob=True, return_finish_reason=True,
        return_num_output_tokens=True,
    ).rest(100)  # fmt: skip
    assert text_of(responses) in ("a small boat", "the deep sea")
    assert responses[-1].outputs["finish_reason"] == ["stop"]
    total = 0.0
    for response in responses:
        found = json.loads(response.outputs["logprobs"][0])
        assert len(found) == response.outputs["num_output_tokens"][0]
        total += sum(next(iter(at.values()))["logprob"] for at in found)
        assert response.outputs["cumulative_logprob"][0] == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_n_outputs_are_n_seeded_answers_to_one_prompt(real: TritonServer, stream: bool) -> None:
    prompt = "The old man looked at the sea and said to the boy that the weather was going to change before night."
    sampling = {"max_tokens": 8, "n": 3, "seed": 5, "ignore_eos": True}
    flags = {"return_finish_reason": True, "return_num_output_tokens": True, "exclude_input_in_output": True}
    before = real.metric("vllm:prompt_tokens_total")
    responses = GrpcStream(real).ask(prompt, sampling, stream=stream, **flags).rest(100)
    columns = list(zip(*(r.outputs["text_output"] for r in responses), strict=True))
    texts = ["".join(column) for column in columns]
    assert len(texts) == len(set(texts)) == 3
    assert responses[-1].outputs["finish_reason"] == ["length"] * 3
    counts = zip(*(r.outputs["num_output_tokens"] for r in responses), strict=True)
    assert [sum(column) for column in counts] == [8, 8, 8]
    singles = [generate(real, prompt, max_tokens=8, seed=5 + at, ignore_eos=True)["text_output"] for at in range(3)]
    assert texts == singles
    until(lambda: real.metric("vllm:prompt_tokens_total") > before, what="the prompt's count")
    until(lambda: real.metric("morph_kv_blocks_used") == 0, what="free blocks")


def test_the_prompt_can_be_scored(real: TritonServer) -> None:
    prompt = "It was the best of times, it was the worst of times. " * 3
    sampling = {"max_tokens": 4, "temperature": 0, "prompt_logprobs": 2}
    flags = {"return_prompt_logprobs": True, "return_num_input_tokens": True, "return_num_cached_tokens": True}
    for _ in range(2):
        responses = GrpcStream(real).ask(prompt, sampling, **flags).rest(100)
        first, *later = [json.loads(r.outputs["prompt_logprobs"][0]) for r in responses if r.outputs]
        assert responses[0].outputs["num_cached_tokens"] == [0], "the prefix cache is not read"
        assert len(first) == responses[0].outputs["num_input_tokens"][0] and first[0] is None
        chosen = [next(iter(at.values())) for at in first[1:]]
        assert prompt.endswith("".join(at["decoded_token"] for at in chosen))
        assert all(at["logprob"] < 0 and at["rank"] >= 1 for at in chosen) and set(later) <= {None}
    known = sum(at["logprob"] for at in chosen[len(chosen) * 2 // 3 :]) / (len(chosen) / 3)
    new = sum(at["logprob"] for at in chosen[: len(chosen) // 3]) / (len(chosen) / 3)
    assert known > new, "a sentence that was read twice before is likelier"


def test_a_client_that_leaves_ends_all_of_its_outputs(real: TritonServer) -> None:
    stream = GrpcStream(real).ask("The sea", {"max_tokens": 1500, "ignore_eos": True, "n": 4})
    stream.next()
    stream.cancel()
    until(lambda: real.metric("vllm:num_requests_running") == 0, what="an idle engine")
    until(lambda: real.metric("morph_kv_blocks_used") == 0, what="free blocks")


def test_a_schema_that_is_refused_is_the_clients_error(real: TritonServer) -> None:
    sampling = json.dumps({"structured_outputs": {"json": {"type": "objec"}}})
    status, body = post(real, {"text_input": "abc", "sampling_parameters": sampling})
    assert status == 400
    assert "structured_outputs: the json is refused by the grammar library: Invalid type: objec." in body["error"]


def test_clients_that_leave_free_the_engine(real: TritonServer) -> None:
    stream = GrpcStream(real).ask("The sea", {"max_tokens": 1500, "ignore_eos": True})
    stream.next()
    stream.cancel()
    connection, answer = open_sse(real, "The sea", max_tokens=1500, ignore_eos=True)
    next(sse_events(answer))
    answer.close()
    connection.close()
    until(lambda: real.metric("vllm:num_requests_running") == 0, what="an idle engine")
    until(lambda: real.metric("morph_kv_blocks_used") == 0, what="free blocks")


@pytest.fixture
def prompt_metrics(tmp_path: Path) -> Iterator[TritonServer]:
    """The product with its metrics as fresh as can be: 20 ms in the engine, 20 ms in the exporter."""
    repository = real_repository(tmp_path / "repository", {"stats_interval_s": 0.02}, METRICS_INTERVAL_MS="20")
    server = TritonServer(tmp_path, {"MORPH_MAX_NUM_SEQS": "4", "MORPH_MODEL_REPOSITORY": str(repository)})
    try:
        yield server.wait_ready(120).wait_metrics()
    finally:
        server.stop()


def test_a_cancelled_stream_frees_its_blocks_soon(prompt_metrics: TritonServer) -> None:
    """200 ms are wanted, some 40 tokens. Counted in tokens, for time passes for a busy machine too."""
    server = prompt_metrics
    took, more = [], []
    for _ in range(10):
        before = server.metric("vllm:generation_tokens_total")
        stream = GrpcStream(server).ask("The sea", {"max_tokens": 1500, "ignore_eos": True})
        for _ in range(20):
            stream.next()
        until(lambda: server.metric("morph_kv_blocks_used") > 0, what="blocks in use")
        began = time.monotonic()
        canceller = threading.Thread(target=stream.cancel)  # returns only when the stream has ended
        canceller.start()
        until(lambda: server.metric("morph_kv_blocks_used") == 0, what="free blocks")
        took.append(time.monotonic() - began)
        canceller.join()
        until(lambda: server.metric("vllm:num_requests_running") == 0)
        more.append(server.metric("vllm:generation_tokens_total") - before)
    print("from cancel() to free blocks, ms:", sorted(round(t * 1e3) for t in took))
    print("tokens of 1500 that were made:", sorted(more))
    assert statistics.median(more) < 300, "it went on after its client had left"


def test_sigterm_with_an_open_stream_leaves_nothing(fresh: TritonServer) -> None:
    stream = GrpcStream(fresh).ask("The sea", {"max_tokens": 200, "ignore_eos": True})
    stream.next()
    fresh.process.send_signal(signal.SIGTERM)
    assert not stream.rest()[-1].error
    assert fresh.process.wait(100) == 0
    assert fresh.family() == []


def test_a_killed_server_takes_its_engine_with_it(fresh: TritonServer) -> None:
    server = next(p for p in fresh.family() if Path(f"/proc/{p}/comm").read_text().strip() == "tritonserver")
    os.kill(server, signal.SIGKILL)
    assert fresh.process.wait(100) == 1
    until(lambda: not fresh.family(), what="the end of all processes")
