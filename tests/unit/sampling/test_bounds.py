"""What choosing tokens takes beside the logits, and what is drawn without a seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from morph_runtime.engine.messages import SamplingParams
from morph_runtime.sampling import sampler as module
from morph_runtime.sampling.sampler import Sampler, workspace_bytes
from sampling.rows_of import row, sampler

ROOT = Path(__file__).resolve().parents[3]
ROWS, VOCAB = 48, 120_000
SLACK = 16 << 20
"""Bytes that the allocator and the libraries take at their first use."""
PROGRAM = """
import json, resource, sys, torch
from morph_runtime.engine.messages import SamplingParams
from sampling.rows_of import row, sampler
torch.set_num_threads(1)
rows, vocab = int(sys.argv[1]), int(sys.argv[2])
params = SamplingParams(**json.loads(sys.argv[3]))
chooser = sampler()
chooser.sample(torch.randn(2, 500), [row(params)] * 2)
logits = torch.randn(rows, vocab)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
chooser.sample(logits, [row(params) for _ in range(rows)])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 + logits.nbytes)
"""


@pytest.mark.parametrize(
    "params",
    [{"top_p": 0.9, "top_k": 50, "min_p": 0.01}, {"logprobs": 20}, {"top_p": 0.5, "logprobs": 5, "seed": 3}, {}],
)
def test_a_step_takes_no_more_than_the_ledger_counts(params: dict[str, float]) -> None:
    # A process of its own: the peak of this one is whatever other tests have left.
    command = [sys.executable, "-c", PROGRAM, str(ROWS), str(VOCAB), json.dumps(params)]
    paths = ":".join(str(path) for path in (ROOT, ROOT / "tests" / "unit"))
    done = subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": paths}, timeout=200
    )
    assert int(done.stdout) <= workspace_bytes(ROWS, VOCAB, torch.device("cpu")) + SLACK


def test_the_size_of_the_chunks_changes_no_seeded_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 400, generator=torch.Generator().manual_seed(1))
    kinds = ({"top_p": 0.8}, {"logprobs": 3}, {"top_k": 7, "temperature": 0.6}, {"temperature": 0.0, "logprobs": 1})
    rows = [row(SamplingParams(seed=at, **kinds[at % 4]), [5] * at) for at in range(9)]  # type: ignore[arg-type]
    whole = sampler().sample(logits.clone(), rows)
    for rows_at_a_time in (1, 2, 4):
        size = rows_at_a_time * 400 * module.TEMPORARY_BYTES_PER_SCORE
        monkeypatch.setitem(module.CHUNK_BYTES, "cpu", size)
        assert sampler().sample(logits.clone(), rows) == whole


def test_two_starts_draw_differently_without_a_seed() -> None:
    logits, rows = torch.zeros(64, 1000), [row(SamplingParams()) for _ in range(64)]
    torch.manual_seed(0)
    first = Sampler((0,), torch.device("cpu")).sample(logits, rows).tokens
    torch.manual_seed(0)
    assert Sampler((0,), torch.device("cpu")).sample(logits, rows).tokens != first
