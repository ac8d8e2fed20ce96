"""At level 0 the engine says, token for token, what `transformers` says, whatever happens beside a request."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from engine.conftest import run_all, submit

if TYPE_CHECKING:
    from engine.conftest import EngineFactory


def prompts_of(count: int, vocab: int, longest: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def assert_is_what_transformers_says(folder: Path, prompts: list[list[int]], said: list[list[int]], each: int) -> None:
    """Each token is the likeliest of `transformers` after all those before it, the end token left out.

    So the whole is its greedy answer; one pass per answer shows it, where generating takes one per token.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        for prompt, tokens in zip(prompts, said, strict=True):
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            logits[:, 0] = float("-inf")  # what min_tokens does
            assert len(tokens) == each
            assert tokens == logits.argmax(-1).tolist()


def test_greedy_tokens_equal_transformers_while_others_come_go_and_are_preempted(
    tiny_model: Path, engines: EngineFactory
) -> None:
    prompts = prompts_of(32, 200, 90, seed=1)
    engine = engines(tiny_model, memory={"kv_tokens": 288})
    rng = random.Random(2)
    todo = list(range(32))
    noise = 1000

    def between(step: int) -> None:
        nonlocal noise
        if todo and step % 4 == 0:
            key = todo.pop(0)
            submit(engine, key, prompts[key], 64, ignore_eos=False, min_tokens=64)
        if step % 5 == 1 and step < 400:
            noise += 1
            submit(engine, noise, prompts[rng.randrange(32)], rng.randint(1, 40))
        if step % 11 == 3 and noise > 1000:
            engine.cancel(rng.randint(1001, noise))

    between(0)
    tokens = run_all(engine, between)
    while todo:
        between(0)
        for key, more in run_all(engine, between).items():
            tokens.setdefault(key, []).extend(more)
    assert engine.parts.scheduler.preemptions > 0, "the test must preempt"
    assert_is_what_transformers_says(tiny_model, prompts, [tokens[key] for key in range(32)], 64)


def test_greedy_tokens_equal_transformers_while_prefixes_are_shared_and_requests_preempted(
    tiny_model: Path, engines: EngineFactory
) -> None:
    rng = random.Random(3)
    stems = prompts_of(3, 200, 1, seed=4)
    stems = [[*stem, *[rng.randrange(1, 200) for _ in range(70)]] for stem in stems]
    prompts = [stems[i % 3][: rng.choice([40, 64, 71])] + [rng.randrange(1, 200)] * (i % 4) for i in range(24)]
    engine = engines(tiny_model, memory={"kv_tokens": 256})
    todo = list(range(24))

    def between(step: int) -> None:
        for key in (todo.pop(0), todo.pop(0)) if todo and step % 7 == 0 else ():
            submit(engine, key, prompts[key], 48, ignore_eos=False, min_tokens=48)

    tokens: dict[int, list[int]] = {}
    while todo:
        between(0)
        for key, more in run_all(engine, between).items():
            tokens.setdefault(key, []).extend(more)
    scheduler = engine.parts.scheduler
    assert scheduler.preemptions > 0, "the test must preempt"
    assert scheduler.prefix_hits > scheduler.prefix_queries / 3, "the test must share"
    assert_is_what_transformers_says(tiny_model, prompts, [tokens[key] for key in range(24)], 48)
