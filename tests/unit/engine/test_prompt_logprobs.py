"""Log probabilities of prompts, against `transformers`, with few rows of logits at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.conftest import EngineFactory, submit
from morph_runtime.engine.batch import make_batch
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import TokenLogprobs

PROMPT = [(7 * i * i + 3 * i) % 199 + 1 for i in range(75)]
MAX_NUM_SEQS = 6


def reference(folder: Path, prompt: list[int]) -> torch.Tensor:
    """Log probabilities [prompt, vocab] of what follows each position."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].log_softmax(-1)


def check(found: list[TokenLogprobs], expected: torch.Tensor, prompt: list[int], top: int) -> None:
    assert len(found) == len(prompt) - 1
    for position, at in enumerate(found):
        row, token = expected[position], prompt[position + 1]
        assert at.ids[0] == token and len(at.ids) == 1 + top
        assert at.values[0] == pytest.approx(float(row[token]), abs=2e-3)
        assert at.values[1:] == pytest.approx(row.topk(top).values.tolist(), abs=2e-3)
        better = int((row > row[token] + 2e-3).sum()), int((row >= row[token] - 2e-3).sum())
        assert better[0] + 1 <= at.rank <= max(better[1], 1)


def run(engine: Engine) -> tuple[dict[int, list[TokenLogprobs]], dict[int, list[int]]]:
    """Scores of prompts and tokens by key; no step has more rows of logits than the memory ledger counts."""
    parts, launch = engine.parts, engine.parts.runner.launch

    def watched(batch: Any, rows: Any, previous: Any) -> Any:
        assert len(rows) == len(batch.logits_at) <= MAX_NUM_SEQS
        return launch(batch, rows, previous)

    parts.runner.launch = watched  # type: ignore[method-assign]
    scores: dict[int, list[TokenLogprobs]] = {}
    tokens: dict[int, list[int]] = {}
    steps = 0
    while engine.has_requests:
        out = engine.step(decide=False)
        for delta in out.tokens if out else ():
            if delta.prompt_logprobs:
                assert delta.key not in scores and delta.key not in tokens, "they come once, with the first token"
                scores[delta.key] = delta.prompt_logprobs
            tokens.setdefault(delta.key, []).extend(delta.tokens)
        steps += 1
        assert steps < 2000
    parts.runner.launch = launch  # type: ignore[method-assign]
    return scores, tokens


@pytest.fixture
def small(engines: EngineFactory, tiny_model: Path) -> Any:
    def make(**sections: dict[str, Any]) -> Engine:
        return engines(tiny_model, scheduler={"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": 24}, **sections)

    return make


@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_they_are_what_transformers_says(small: Any, tiny_model: Path, top: int, overlap: str) -> None:
    engine = small()
    engine._overlaps = overlap == "on"
    submit(engine, 1, PROMPT, 5, prompt_logprobs=top)
    scores, tokens = run(engine)
    check(scores[1], reference(tiny_model, PROMPT), PROMPT, top)
    submit(engine, 2, PROMPT, 5)
    assert run(engine)[1][2] == tokens[1], "the output is that of a request without them"


def test_a_cached_prompt_is_computed_again_and_then_serves_others(small: Any, tiny_model: Path) -> None:
    engine = small()
    submit(engine, 1, PROMPT, 2)
    run(engine)
    submit(engine, 2, PROMPT, 2, prompt_logprobs=1)
    scores, _ = run(engine)
    check(scores[2], reference(tiny_model, PROMPT), PROMPT, 1)
    assert engine.stats().prefix_hits == 0
    submit(engine, 3, PROMPT, 2)
    run(engine)
    assert engine.stats().prefix_hits == 72


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_in_company_and_with_a_full_house(small: Any, tiny_model: Path, overlap: str) -> None:
    engine = small(memory={"kv_tokens": 1024})
    engine._overlaps = overlap == "on"
    prompts = {key: [*PROMPT[key:], *PROMPT[:key]][: 20 + 7 * key] for key in range(1, 9)}
    for key, prompt in prompts.items():
        submit(engine, key, prompt, 12, **({"prompt_logprobs": 2} if key % 2 else {}))
    scores, tokens = run(engine)
    assert sorted(scores) == [1, 3, 5, 7] and {len(t) for t in tokens.values()} == {12}
    for key, found in scores.items():
        check(found, reference(tiny_model, prompts[key]), prompts[key], 2)


def test_a_preempted_prompt_is_scored_once(small: Any, tiny_model: Path) -> None:
    engine = small(memory={"kv_tokens": 96}, model={"max_model_len": 96}, cache={"prefix": False})
    for key in range(1, 5):
        submit(engine, key, PROMPT[: 10 + key], 40, prompt_logprobs=1)
    scores, tokens = run(engine)
    assert engine.parts.scheduler.preemptions > 0
    assert {len(t) for t in tokens.values()} == {40}
    expected = reference(tiny_model, PROMPT)
    for key in range(1, 5):
        check(scores[key], expected, PROMPT[: 10 + key], 1)


def test_a_prompt_preempted_half_way_is_scored_on_from_there(small: Any, tiny_model: Path) -> None:
    engine = small()
    submit(engine, 1, PROMPT, 3, prompt_logprobs=1)
    for _ in range(4):
        engine.step(decide=False)
    scheduler, request = engine.parts.scheduler, engine.parts.scheduler.running[0]
    assert 0 < request.scored < len(PROMPT) - 1
    scored = request.scored
    plan = scheduler.schedule(0)
    assert make_batch(plan, 8)[0].logits_at.shape[0] == plan.rows
    scheduler._preempt(request, plan)
    assert request.computed == 0 and request.scored == scored
    scores, _ = run(engine)
    check(scores[1], reference(tiny_model, PROMPT), PROMPT, 1)


@pytest.mark.parametrize("prompt", [[5], [5, 6]])
def test_the_shortest_prompts(small: Any, tiny_model: Path, prompt: list[int]) -> None:
    engine = small()
    submit(engine, 1, prompt, 2, prompt_logprobs=1)
    scores, tokens = run(engine)
    assert len(tokens[1]) == 2
    assert len(scores.get(1, [])) == len(prompt) - 1
