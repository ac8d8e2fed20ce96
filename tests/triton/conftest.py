from __future__ import annotations

from collections.abc import Iterator

import pytest

from tiny_model import write_tiny_model
from triton_server import TritonServer, fake_repository


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model) -> Iterator[TritonServer]:
    """The server that most tests share: 8 sequences at a time, 5 ms per token."""
    folder = tmp_path_factory.mktemp("triton")
    server = TritonServer(
        folder,
        {
            "MORPH_MODEL": str(tiny_model),
            "MORPH_MODEL_REPOSITORY": str(fake_repository(folder / "repository")),
            "MORPH_MAX_NUM_SEQS": "8",
            "FAKE_STEP_MS": "5",
        },
    )
    try:
        yield server.wait_ready().wait_metrics()
    finally:
        assert server.stop() == 0, server.output()


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory, tiny_model) -> Iterator[TritonServer]:
    """One sequence at a time, one in the line, a queue of 6."""
    folder = tmp_path_factory.mktemp("narrow")
    environment = {
        "MORPH_MODEL": str(tiny_model),
        "MORPH_MODEL_REPOSITORY": str(fake_repository(folder / "repository", max_queue_size="6")),
        "MORPH_MAX_NUM_SEQS": "1",
        "FAKE_STEP_MS": "5",
    }
    server = TritonServer(folder, environment)
    try:
        yield server.wait_ready().wait_metrics()
    finally:
        assert server.stop() == 0, server.output()


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The product as it ships, with the demo model."""
    server = TritonServer(tmp_path_factory.mktemp("real"), {"MORPH_MAX_NUM_SEQS": "4"})
    try:
        yield server.wait_ready(120).wait_metrics()
    finally:
        assert server.stop() == 0, server.output()
