"""A server pinned at a rung: a static baseline by configuration alone, under a replay, and as a judge of texts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import pytest

from morph_client.aio_client import AsyncMorphClient
from morph_client.compare.scoring import Scorer, quality
from morph_client.loadgen import LoadOptions
from morph_client.prompts import measure_tokens_per_word, words_of
from morph_client.replay_plan import Cuts, PromptSource, ReplayPlan
from morph_client.replay_run import Replayed, ReplayWatch, run_replay
from morph_client.stats import Targets
from morph_client.traces import Trace, TraceRequest
from triton_server import TritonServer
from wire_client import until

pytestmark = pytest.mark.triton
TOKENS, REQUESTS = 24, 12


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The demo model with all layers at W4, in a mode that would go back up at once, and little KV cache."""
    environment = {"MORPH_PIN": "w4", "MORPH_MODE": "performance", "MORPH_KV_TOKENS": "512"}
    server = TritonServer(tmp_path_factory.mktemp("pinned"), environment)
    try:
        yield server.wait_ready(120).wait_metrics()
    finally:
        assert server.stop() == 0, server.output()


async def replay(server: TritonServer) -> tuple[Replayed, int, float]:
    """A burst, and what the server says of the outputs: how many it could score, and their perplexity."""
    trace = Trace("burst", "morph", tuple(TraceRequest(0.02 * i, 80, TOKENS) for i in range(REQUESTS)))
    plan = ReplayPlan(trace, Cuts(), PromptSource(), words_of(None), Targets(60.0), 120.0, 1, keep_text=True)
    url, metrics = f"localhost:{server.grpc}", f"http://localhost:{server.metrics}/metrics"
    async with AsyncMorphClient(url, metrics_url=metrics) as client:
        ratio = await measure_tokens_per_word(client, plan.words)
        assert plan.load_options == LoadOptions(0.0, 0, None, 120.0, True)
        done = await run_replay(plan, client, plan.requests(ratio), ReplayWatch())
        texts = [(done.requests[r.index].prompt, r.prompt_tokens, r.text or "") for r in done.run.records]
        scores = await Scorer(client).score(texts)
    found = {i: score for i, score in enumerate(scores) if score is not None}
    told = quality(found)
    assert told is not None
    return done, told.tokens, told.perplexity


def test_a_pinned_rung_serves_every_token_and_scores_what_it_wrote(pinned: TritonServer) -> None:
    until(lambda: pinned.metric("morph_level") == 12, what="the first figures of the engine")
    assert pinned.metric("morph_layers", rung="w4") == pinned.metric("morph_level_max") == 12
    assert pinned.metric("morph_kv_blocks_capacity") > pinned.metric("morph_kv_blocks_base")
    done, scored, perplexity = asyncio.run(replay(pinned))
    summary = done.run.summary
    assert summary.errors == 0 and summary.output_tokens == REQUESTS * TOKENS
    assert summary.rung_share is not None and summary.rung_share.w4 == pytest.approx(1.0)
    assert dict(done.run.by_level) == {12: REQUESTS * TOKENS}
    assert sum(b.rungs.w4 for b in done.run.precision) == pytest.approx(REQUESTS * TOKENS)
    assert done.run.changes == [] and pinned.metric("morph_level") == 12
    assert scored == pytest.approx(REQUESTS * TOKENS, rel=0.1), "only the outputs' own tokens count"
    assert 1.0 < perplexity < math.e**3, "greedy text is likely text to the model that wrote it"
