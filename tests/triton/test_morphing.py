"""A burst through the real server: layers go down, the KV cache grows, no stream is lost, and all comes back."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

import pytest

from triton_server import TritonServer
from wire_client import GrpcStream, text_of, until

pytestmark = pytest.mark.triton
TOKENS = 48


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The demo model with a KV cache that a few requests fill."""
    environment = {"MORPH_KV_TOKENS": "1024", "MORPH_MODE": "performance", "MORPH_MAX_NUM_BATCHED_TOKENS": "256"}
    server = TritonServer(tmp_path_factory.mktemp("small"), environment)
    try:
        yield server.wait_ready(120).wait_metrics()
    finally:
        assert server.stop() == 0, server.output()


def test_a_burst_moves_layers_and_blocks_and_every_stream_gets_its_tokens(small: TritonServer) -> None:
    base = small.metric("morph_kv_blocks_base")
    assert small.metric("morph_kv_blocks_capacity") == base
    prompt = "The captain looked at the sea for a long while, and said nothing. " * 8
    streams = [
        GrpcStream(small).ask(
            prompt,
            {"max_tokens": TOKENS, "ignore_eos": True},
            return_morph_level=True,
            return_num_output_tokens=True,
        )
        for _ in range(24)
    ]
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
    assert small.metric("morph_kv_blocks_used") == 0
    assert small.metric("morph_layers", rung="full") == 12
    assert small.metric("morph_decisions_total", action="down") > 0
    assert small.metric("morph_decisions_total", action="up") > 0
    down, up = (small.metric("morph_shifts_total", direction=d) for d in ("down", "up"))
    assert down == up > 0
    said = [line for line in small.output().splitlines() if line.startswith("morph: level ")]
    assert said[0].startswith("morph: level 0 -> ") and " down (" in said[0] and " demand=" in said[0]
    assert any(" up (" in line for line in said)
    assert len(said) == sum(small.metric("morph_decisions_total", action=action) for action in ("down", "up"))


def test_a_backlog_of_short_requests_drains_without_pauses(small: TritonServer) -> None:
    """Triton's batcher alone would take one request per 500 ms from its queue, 12 s in all."""
    until(lambda: small.metric("vllm:num_requests_running") == 0)
    nudges, rejected = "morph_queue_nudges_total", "nv_inference_request_failure"
    before = small.metric(nudges), small.metric(rejected, reason="REJECTED")
    streams = [GrpcStream(small).ask("The sea", {"max_tokens": 1}) for _ in range(24)]
    for stream in streams:
        assert not stream.rest()[-1].error
    ends_s = sorted(stream.started_s + stream.responses[-1].at_s for stream in streams)
    assert statistics.median(after - before for before, after in itertools.pairwise(ends_s)) < 0.4
    until(lambda: small.metric(nudges) > before[0], what="nudges")
    until(
        lambda: small.metric(nudges) - before[0] == small.metric(rejected, reason="REJECTED") - before[1],
        what="one rejection for each nudge",
    )
