"""An engine on a GPU that is killed, or whose CUDA context is spoilt, is replaced, and its streams go on as if nothing
had been."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from engine.conftest import make_model
from engine.test_keeper import Hearer
from morph_runtime.config import EngineConfig
from morph_runtime.engine.client import EngineClient, EngineListener
from morph_runtime.engine.handle import KeeperSettings
from morph_runtime.engine.keeper import EngineKeeper
from morph_runtime.engine.messages import SamplingParams, Submit

DEVICE = "cuda"
TOKENS = 150
START_S = 300.0
"""The first engine compiles its kernels."""
CASES = (
    SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=TOKENS, seed=7, temperature=1.3, top_p=0.95, ignore_eos=True),
    SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, repetition_penalty=1.2),
    SamplingParams(max_tokens=TOKENS, seed=11, temperature=1.5, min_tokens=120, ignore_eos=True),
)
INTERPRETER = """#!{python}
import runpy, signal, sys
import torch

def spoil(*_):
    torch.zeros(4, device="cuda")[torch.tensor([1 << 20], device="cuda")]  # an assertion fails on the device

signal.signal(signal.SIGUSR1, spoil)
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""What the engine runs under: Python, where SIGUSR1 brings about a CUDA error that no later call survives."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), kv_heads=2)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bin") / "python"
    path.write_text(INTERPRETER.format(python=sys.executable), encoding="utf-8")
    path.chmod(0o755)
    return path


class Keeping:
    """A keeper of engines, and the one that runs."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.config = EngineConfig.from_mapping(
            {
                "device": DEVICE,
                "model": {"path": str(folder), "dtype": "float32"},
                "memory": {"kv_tokens": 2048},
                "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 48},
                "morph": {"mode": "off", "costs": "off"},
            }
        )
        self.python, self.hearer = str(python), Hearer()
        self.clients: list[EngineClient] = []
        settings = KeeperSettings(restarts=6, pause_s=0.01, start_timeout_s=START_S)
        self.keeper = EngineKeeper(self._make, self.hearer, settings)

    def _make(self, listener: EngineListener) -> EngineClient:
        self.clients.append(EngineClient(self.config, listener, python=self.python))
        return self.clients[-1]

    def serve(self, strikes: list[tuple[int, int]]) -> dict[int, list[int]]:
        """All cases; `strikes` are signals to the engine, each after so many tokens. Returns the tokens."""
        hearer, due = self.hearer, list(strikes)
        for key, sampling in enumerate(CASES):
            self.keeper.submit(Submit(key=key, prompt=[3, 1, 4, 1, 5, 9, 2, 6, key + 1], sampling=sampling))
        while len(hearer.finished) < len(CASES):
            seen = sum(map(len, hearer.tokens.values()))
            if due and seen >= due[0][0]:
                before = hearer.restarted
                os.kill(self.clients[-1].pid, due.pop(0)[1])
                hearer.wait(lambda before=before: hearer.restarted > before)
            else:
                hearer.wait(
                    lambda seen=seen: sum(map(len, hearer.tokens.values())) > seen or len(hearer.finished) == len(CASES)
                )
        assert not due and not hearer.down
        assert set(hearer.finished.values()) == {"length"}
        return hearer.tokens


@pytest.fixture
def keepings(folder: Path, python: Path) -> Iterator[list[Keeping]]:
    made = [Keeping(folder, python), Keeping(folder, python)]
    with ExitStack() as ends:
        for each in made:
            ends.callback(each.keeper.close)
            each.keeper.start(START_S)
        yield made


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGUSR1], ids=["killed", "segfault", "CUDA"])
def test_tokens_after_an_engines_end_are_those_of_an_undisturbed_run(keepings: list[Keeping], number: int) -> None:
    calm, stormy = keepings
    assert stormy.serve([(60, number), (300, number)]) == calm.serve([])
    assert stormy.hearer.restarted >= 2
