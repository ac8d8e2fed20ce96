"""A burst through the real server: layers go down, the KV cache grows, no stream is lost, and all comes back."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from morph_client.errors import InvalidRequest
from morph_client.sync_client import MorphClient
from test_crash import engine_of
from triton_server import TritonServer
from wire_client import GrpcStream, pending, text_of, until

pytestmark = pytest.mark.triton
TOKENS = 48
KEY = "a-key-of-the-administrator"
HOLD_S = 30.0
"""Less than the silence after which an engine counts as wedged."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The demo model with a KV cache that a few requests fill."""
    environment = {
        "MORPH_KV_TOKENS": "1024",
        "MORPH_MODE": "performance",
        "MORPH_MAX_NUM_BATCHED_TOKENS": "256",
        "MORPH_SLO_CLASSES": "interactive=2/0.5,batch=60",
        "MORPH_ADMIN_KEY": KEY,
    }
    server = TritonServer(tmp_path_factory.mktemp("small"), environment)
    try:
        yield server.wait_ready(120).wait_metrics()
    finally:
        assert server.stop() == 0, server.output()


def told(server: TritonServer) -> list[str]:
    """What the log says of changes of level; it may be a little behind the metrics."""
    return [line for line in server.output().splitlines() if line.startswith("morph: level ")]


def decisions(server: TritonServer) -> float:
    return sum(server.metric("morph_decisions_total", action=action) for action in ("down", "up"))


@contextmanager
def held(server: TritonServer) -> Iterator[None]:
    """The engine stands still, so that a backlog comes about however slow the machine makes the clients."""
    engine = engine_of(server)
    os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine, signal.SIGCONT)


def test_a_burst_moves_layers_and_blocks_and_every_stream_gets_its_tokens(small: TritonServer) -> None:
    base = small.metric("morph_kv_blocks_base")
    assert small.metric("morph_kv_blocks_capacity") == base
    prompt = "The captain looked at the sea for a long while, and said nothing. " * 8
    with held(small):
        streams = [
            GrpcStream(small).ask(
                prompt,
                {"max_tokens": TOKENS, "ignore_eos": True},
                return_morph_level=True,
                return_num_output_tokens=True,
            )
            for _ in range(24)
        ]
        until(lambda: pending(small) >= 11, HOLD_S, "a backlog")
    until(lambda: small.metric("morph_level") > 0, what="a down-shift")
    until(lambda: small.metric("morph_kv_blocks_capacity") > base, what="a larger KV cache")
    levels = []
    for stream in streams:
        responses = stream.rest(120)
        assert not responses[-1].error
        assert sum(r.final for r in responses) == 1 and responses[-1].final
        assert sum(int(r.outputs["num_output_tokens"][0]) for r in responses) == TOKENS
        levels.append([int(level) for r in responses for level in r.outputs["morph_level"]])
        assert text_of(responses)
    assert all(len(of_stream) == TOKENS for of_stream in levels)
    assert max(max(of_stream) for of_stream in levels) > 0
    until(lambda: small.metric("morph_level") == 0, what="the return to full precision")
    until(lambda: small.metric("morph_kv_blocks_capacity") == base, what="the KV cache as it was")
    until(lambda: small.metric("morph_kv_blocks_used") == 0, what="free blocks")
    assert small.metric("morph_layers", rung="full") == 12
    assert small.metric("morph_decisions_total", action="down") > 0
    assert small.metric("morph_decisions_total", action="up") > 0
    down, up = (small.metric("morph_shifts_total", direction=d) for d in ("down", "up"))
    assert down == up > 0
    until(lambda: len(told(small)) == decisions(small), what="a line for each decision")
    said = told(small)
    assert said[0].startswith("morph: level 0 -> ") and " down (" in said[0] and " demand=" in said[0]
    assert any(" up (" in line for line in said)


def test_a_backlog_of_short_requests_drains_without_pauses(small: TritonServer) -> None:
    """Triton's batcher alone would take one request per 500 ms from its queue, 12 s in all."""
    until(lambda: small.metric("vllm:num_requests_running") == 0)
    nudges, rejected = "morph_queue_nudges_total", "nv_inference_request_failure"
    before = small.metric(nudges), small.metric(rejected, reason="REJECTED")
    with held(small):  # all have come before the first can go: nobody's arrival wakes the batcher for another
        prompt = "The captain looked at the sea for a long while, and said nothing. " * 4
        streams = [GrpcStream(small).ask(prompt, {"max_tokens": 1}) for _ in range(24)]
        until(lambda: pending(small) >= 12, HOLD_S, "a backlog")
    for stream in streams:
        assert not stream.rest()[-1].error
    ends_s = sorted(stream.started_s + stream.responses[-1].at_s for stream in streams)
    assert statistics.median(after - before for before, after in itertools.pairwise(ends_s)) < 0.4
    until(lambda: small.metric(nudges) > before[0], what="nudges")
    until(
        lambda: small.metric(nudges) - before[0] == small.metric(rejected, reason="REJECTED") - before[1],
        what="one rejection for each nudge",
    )


def test_a_backlog_that_waits_for_blocks_stays_in_tritons_queue(small: TritonServer) -> None:
    prompt = "The captain looked at the sea for a long while, and said nothing. " * 8
    count, most_outside = 24, 13
    try:
        with MorphClient(f"127.0.0.1:{small.grpc}") as client:
            client.set_mode("off", admin_key=KEY)
        with held(small):
            streams = [GrpcStream(small).ask(prompt, {"max_tokens": 64, "ignore_eos": True}) for _ in range(count)]
            until(lambda: pending(small) >= count - most_outside, HOLD_S, "a backlog")
        for stream in streams[:2]:
            stream.next()  # they run: what could get in has got in
        # The cache holds fewer than 10 such prompts; 2 may be in the engine's line, and execute() holds one.
        with held(small):  # nothing more ends, and what has ended is heard of in time
            until(
                lambda: pending(small) >= count - most_outside - sum(stream.ended.is_set() for stream in streams),
                HOLD_S,
                "the others in the queue",
            )
        for stream in streams:
            assert not stream.rest(120)[-1].error
        until(lambda: pending(small) == 0, what="an empty queue")
    finally:
        with MorphClient(f"127.0.0.1:{small.grpc}") as client:
            client.set_mode("performance", admin_key=KEY)
        until(lambda: small.metric("morph_mode", mode="performance") == 1, what="the mode as it was")


def test_mode_and_cap_change_while_it_serves_and_for_the_administrator_alone(small: TritonServer) -> None:
    def in_force(mode: str, cap: float) -> bool:
        return small.metric("morph_mode", mode=mode) == 1 and small.metric("morph_cap") == cap

    assert in_force("performance", 1.0)
    stream = GrpcStream(small).ask("The sea", {"max_tokens": TOKENS, "ignore_eos": True})
    with MorphClient(f"127.0.0.1:{small.grpc}") as client:
        assert client.set_mode("balanced", cap=0.5, admin_key=KEY) == "mode balanced, cap 0.5."
        until(lambda: in_force("balanced", 0.5), what="the new mode")
        with pytest.raises(InvalidRequest, match="MORPH_ADMIN_KEY"):
            client.set_mode("off", admin_key="a-wrong-key-of-nobody")
        with pytest.raises(InvalidRequest, match="accuracy, balanced, performance, off"):
            client.set_mode("fast", admin_key=KEY)
        with pytest.raises(InvalidRequest, match=r"from 0 .* to 1"):
            client.set_mode(cap=1.5, admin_key=KEY)
        assert client.set_mode(cap=1.0, admin_key=KEY) == "cap 1."
        until(lambda: in_force("balanced", 1.0), what="the mode that it had, and the new cap")
    assert not stream.rest(60)[-1].error


def test_a_request_of_an_unknown_class_is_told_the_known_ones(small: TritonServer) -> None:
    with MorphClient(f"127.0.0.1:{small.grpc}") as client:
        with pytest.raises(InvalidRequest, match="slo_class: must be one of interactive, batch, but is 'gold'"):
            client.generate("The sea", slo_class="gold")
        assert client.generate("The sea", slo_class="batch").finish_reason


def test_the_inputs_of_the_controller_are_shown(small: TritonServer) -> None:
    until(lambda: small.metric("morph_signal_ok", signal="queue") == 1, what="Triton's queue is read")
    assert small.metric("morph_slo_feasible") in (0, 1)
    assert small.metric("morph_estimate_error", what="prompt") >= 0
    assert small.metric("morph_computed_tokens_total", kv="clean") > 0
