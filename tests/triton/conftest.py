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
