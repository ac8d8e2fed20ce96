"""A client that does not read what it asked for: the others do not notice, and no block waits for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slow_client import SlowGrpc, SlowSse
from triton_server import TritonServer
from wire_client import GrpcStream, until

pytestmark = [pytest.mark.triton, pytest.mark.timeout(240)]

TOKENS = 600
SLOW = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "logprobs": 20}
"""Some 2 KB per token, so over 1 MB per stream: more than the windows of HTTP/2 and of the sockets hold."""
KINDS = (SlowGrpc, SlowGrpc, SlowSse, SlowSse)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    server = TritonServer(tmp_path_factory.mktemp("wide"), {"MORPH_MAX_NUM_SEQS": "8", "MORPH_KV_TOKENS": "8192"})
    try:
        yield server.wait_ready(120).wait_metrics()
    finally:
        assert server.stop() == 0, server.output()


def test_streams_that_nobody_reads_hold_up_nobody_and_lose_nothing(wide: TritonServer) -> None:
    slow = [kind(wide) for kind in KINDS]
    for client in slow:
        client.ask("Once upon a time", SLOW)
    begun = [client.read()["tokens"] for client in slow]
    quick = GrpcStream(wide).ask("The sea", {"max_tokens": 40, "ignore_eos": True}, return_num_output_tokens=True)
    assert sum(r.outputs["num_output_tokens"][0] for r in quick.rest(60) if r.outputs) == 40
    until(lambda: wide.metric("vllm:num_requests_running") == 0, 120.0, "the end of what nobody reads")
    until(lambda: wide.metric("morph_kv_blocks_used") == 0, 5.0, "free blocks")
    for client, first in zip(slow, begun, strict=True):
        responses = list(client.rest())
        assert first + sum(response["tokens"] for response in responses) == TOKENS
        assert [response["last"] for response in responses].count(True) == 1
        client.close()


def test_readers_that_stop_and_then_leave_free_their_blocks(wide: TritonServer) -> None:
    cancelled = wide.metric("morph_requests_total", outcome="cancelled")
    slow = [kind(wide) for kind in KINDS]
    for client in slow:
        client.ask("Once upon a time", SLOW)
    for client in slow:
        client.read()
    for client in slow:
        client.close()
    until(lambda: wide.metric("morph_requests_total", outcome="cancelled") == cancelled + 4, 60.0, "their ends")
    until(lambda: wide.metric("morph_kv_blocks_used") == 0, 30.0, "free blocks")
