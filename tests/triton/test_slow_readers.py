"""A client that does not read what it asked for: the others do not notice, and no block waits for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slow_client import SlowGrpc, SlowSse
from triton_server import TritonServer
from wire_client import GrpcStream, until

pytestmark = pytest.mark.triton

TOKENS = 1500
SLOW = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "logprobs": 20}
"""Some 2 KB per token, so 3 MB per stream: more than the windows of HTTP/2 and the sockets hold."""
CLIENTS = 4


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    server = TritonServer(tmp_path_factory.mktemp("wide"), {"MORPH_MAX_NUM_SEQS": "8", "MORPH_KV_TOKENS": "8192"})
    try:
        yield server.wait_ready(120).wait_metrics()
    finally:
        assert server.stop() == 0, server.output()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", [SlowGrpc, SlowSse])
def test_streams_that_nobody_reads_hold_up_nobody(wide: TritonServer, kind: type[SlowGrpc | SlowSse]) -> None:
    slow = [kind(wide) for _ in range(CLIENTS)]
    for client in slow:
        client.ask("Once upon a time", SLOW)
        client.read()
    for _ in range(3):
        quick = GrpcStream(wide).ask("The sea", {"max_tokens": 40, "ignore_eos": True}, return_num_output_tokens=True)
        assert sum(r.outputs["num_output_tokens"][0] for r in quick.rest(60) if r.outputs) == 40
    until(lambda: wide.metric("vllm:num_requests_running") == 0, 120.0, "the engine at rest")
    assert wide.metric("morph_kv_blocks_used") == 0
    for client in slow[:2]:  # these read on, and everything is there
        responses = list(client.rest())
        assert sum(response["tokens"] for response in responses) in (TOKENS - 1, TOKENS - 2)
        assert [response["last"] for response in responses].count(True) == 1
    before = wide.metric("morph_requests_total")
    for client in slow:
        client.close()
    assert wide.metric("morph_requests_total") == before, "each of them had ended before"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", [SlowGrpc, SlowSse])
def test_a_reader_that_leaves_in_the_middle_frees_its_blocks(
    wide: TritonServer, kind: type[SlowGrpc | SlowSse]
) -> None:
    cancelled = wide.metric("morph_requests_total", outcome="cancelled")
    slow = [kind(wide) for _ in range(CLIENTS)]
    for client in slow:
        client.ask("Once upon a time", SLOW)
        client.read()
    for client in slow:
        client.close()
    until(lambda: wide.metric("morph_requests_total", outcome="cancelled") == cancelled + CLIENTS, 60.0, "their ends")
    until(lambda: wide.metric("morph_kv_blocks_used") == 0, 30.0, "free blocks")
