"""Models as users bring them, through the real server: an AWQ checkpoint for W4, a pack, and a pack that is stale."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.conftest import make_model
from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.messages import SamplingParams, Submit
from morph_runtime.text.tokenizer import Tokenizer
from tiny_model import tiny_tokenizer
from triton_server import ROOT, TritonServer
from weights.awq_packer import make_awq
from wire_client import GrpcStream, until

pytestmark = pytest.mark.triton
LAYERS = 4
PROMPT = "the quick brown fox jumps over the lazy dog"
TOKENS = 12
# Equal to the last bit with the engine in this process: float32, one thread, nothing out of a cache.
EXACT = {"MORPH_DTYPE": "float32", "MORPH_THREADS": "1", "MORPH_PREFIX_CACHE": "false"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded multi-head model with a tokenizer: AWQ moves scales in V of such."""
    folder = make_model(tmp_path_factory.mktemp("checkpoint") / "model", kv_heads=4, vocab=320)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def awq(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in AutoAWQ's layout."""
    return make_awq(model, tmp_path_factory.mktemp("awq") / "awq")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    """Starts servers on a copy of the repository with a `model.json` of the test's own."""
    started: list[TritonServer] = []

    def start(environment: dict[str, str], settings: dict[str, Any] | None = None) -> TritonServer:
        folder = tmp_path / str(len(started))
        repository = folder / "repository"
        shutil.copytree(ROOT / "model_repository", repository)
        (repository / "morph" / "1" / "model.json").write_text(json.dumps(settings or {}))
        server = TritonServer(folder, {**EXACT, "MORPH_MODEL_REPOSITORY": str(repository), **environment})
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


def expected(level: int, **model: str) -> list[int]:
    """The tokens with which an engine in this process answers the prompt at a level."""
    config = {
        "model": {**model, "dtype": "float32"}, "memory": {"kv_tokens": 512}, "kernels": {"threads": 1},
        "morph": {"mode": "off", "ladder": ["w4"]}, "cache": {"prefix": False},
    }  # fmt: skip
    prompt = Tokenizer(tiny_tokenizer()).encode_prompt(PROMPT, 200)
    engine = build_engine(EngineConfig.from_mapping(config))
    try:
        engine.set_level(level)
        sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        engine.submit(Submit(key=1, prompt=prompt, sampling=sampling))
        tokens: list[int] = []
        while engine.has_requests:
            out = engine.step(decide=False)
            tokens += [token for delta in out.tokens for token in delta.tokens] if out else []
    finally:
        engine.close()
    return tokens


def answer(server: TritonServer) -> tuple[list[int], set[int]]:
    """The tokens of the server's answer to the prompt, and the levels at which they were computed."""
    sampling = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    responses = GrpcStream(server).ask(PROMPT, sampling, return_logprobs=True, return_morph_level=True).rest(60)
    assert not responses[-1].error, responses[-1].error
    tokens = [int(token) for r in responses for at in json.loads(r.outputs["logprobs"][0]) for token in at]
    return tokens, {level for r in responses for level in r.outputs["morph_level"]}


def test_w4_comes_from_an_awq_checkpoint_under_a_burst_and_full_precision_comes_back(
    serve: Any, model: Path, awq: Path
) -> None:
    full, w4 = expected(0, path=str(model)), expected(LAYERS, path=str(model), awq_path=str(awq))
    rounded = expected(LAYERS, path=str(model))
    assert w4 not in (full, rounded) and full != rounded, "the three have to be told apart"
    environment = {
        "MORPH_MODEL": str(model),
        "MORPH_AWQ": str(awq),
        "MORPH_KV_TOKENS": "512",
        "MORPH_MODE": "performance",
    }
    server = serve(environment, {"morph": {"dwell_s": 4.0}, "stats_interval_s": 0.05})
    server.wait_ready(120).wait_metrics()
    assert answer(server) == (full, {0})
    load = {"max_tokens": 100, "ignore_eos": True, "temperature": 0}
    streams = [GrpcStream(server).ask(f"{number} hello world " * 6, load) for number in range(24)]
    until(lambda: server.metric("morph_level") == LAYERS, what="the deepest level")
    for stream in streams:
        assert not stream.rest(120)[-1].error
    assert answer(server) == (w4, {LAYERS})
    until(lambda: server.metric("morph_level") == 0, what="the return to full precision")
    assert answer(server) == (full, {0})


def pack(model: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "-c", "from morph_client.cli import main; main()", "pack", str(model), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}"}
    subprocess.run([*command, "--dtype", "float32", *options], check=True, env=environment, capture_output=True)


def test_a_pack_is_served_and_a_stale_one_is_refused_with_its_sentence(
    serve: Any, model: Path, awq: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(model, tmp_path / "source"))
    packed = tmp_path / "pack"
    pack(source, packed, "--awq", str(awq))
    environment = {"MORPH_MODEL": str(packed), "MORPH_PACK_SOURCE": str(source), "MORPH_KV_TOKENS": "512"}
    server = serve(environment).wait_ready(120)
    assert answer(server) == (expected(0, path=str(model)), {0})
    assert server.stop() == 0
    weights = source / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    refused = serve(environment)
    assert refused.process.wait(60) == 1
    assert refused.output().splitlines()[-1] == (
        f"{packed} is stale: {weights} has changed since the pack was made; make it again with 'morph pack'."
    )
