"""An engine on a GPU that is killed, or whose CUDA context is spoilt, is replaced, and its streams go on as if nothing
had been."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from engine.conftest import make_model
from engine.test_keeper import CASES as ALL_CASES
from engine.test_keeper import Keeping
from morph_runtime.config import EngineConfig
from morph_runtime.engine.handle import KeeperSettings

DEVICE = "cuda"
CASES = {name: ALL_CASES[name] for name in ("greedy", "seeded", "penalties", "min_tokens")}
SETTINGS = KeeperSettings(restarts=6, pause_s=0.01, start_timeout_s=300)
"""The first engine compiles its kernels."""
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


@pytest.fixture
def keepings(folder: Path, python: Path) -> Iterator[list[Keeping]]:
    config = EngineConfig.from_mapping(
        {
            "device": DEVICE,
            "model": {"path": str(folder), "dtype": "float32"},
            "memory": {"kv_tokens": 2048},
            "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 48},
            "morph": {"mode": "off", "costs": "off"},
        }
    )
    with ExitStack() as ends:
        made = []
        for _ in range(2):
            made.append(Keeping(config, SETTINGS, CASES, str(python)))
            ends.callback(made[-1].keeper.close)
        yield made


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGUSR1], ids=["killed", "segfault", "CUDA"])
def test_tokens_after_an_engines_end_are_those_of_an_undisturbed_run(keepings: list[Keeping], number: int) -> None:
    calm, stormy = keepings
    strikes = [60, 300]

    def strike(tokens: int) -> bool:
        if not strikes or tokens < strikes[0]:
            return False
        strikes.pop(0)
        stormy.kill(number)
        return True

    calm.serve()
    stormy.serve(strike)
    assert not strikes and not stormy.hearer.down and stormy.hearer.restarted >= 2
    assert (stormy.hearer.tokens, stormy.hearer.finished) == (calm.hearer.tokens, calm.hearer.finished)
    assert set(calm.hearer.finished.values()) <= {"length", "stop"}
