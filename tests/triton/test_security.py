"""What an unknown client may not do."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from triton_server import TritonServer, fake_repository
from wire_client import generate

pytestmark = pytest.mark.triton

KEY = "a-key-of-the-administrator"
REGION = {"key": "/morph_test_region", "offset": 0, "byte_size": 64}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("guarded")
    environment = {
        "MORPH_MODEL": str(tiny_model),
        "MORPH_MODEL_REPOSITORY": str(fake_repository(folder / "repository")),
        "MORPH_ADMIN_KEY": KEY,
    }
    server = TritonServer(folder, environment)
    try:
        yield server.wait_ready().wait_metrics()
    finally:
        assert server.stop() == 0, server.output()


def call(server: TritonServer, path: str, body: object, key: str = "") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=60)
    try:
        connection.request("POST", path, json.dumps(body), {"admin-key": key} if key else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


ADMIN = [
    ("/v2/repository/index", {}),
    ("/v2/repository/models/morph/unload", {}),
    ("/v2/repository/models/morph/load", {}),
    ("/v2/systemsharedmemory/region/x/register", REGION),
    ("/v2/logging", {"log_file": "somewhere"}),
    ("/v2/trace/setting", {"trace_file": "somewhere"}),
]


@pytest.mark.parametrize("path, body", ADMIN, ids=[path for path, _ in ADMIN])
@pytest.mark.parametrize("key", ["", "a-wrong-key-of-nobody"])
def test_the_administrators_endpoints_need_the_key(guarded: TritonServer, path: str, body: object, key: str) -> None:
    status, text = call(guarded, path, body, key)
    assert status == 403, text
    assert "restricted" in text


def test_with_the_key_they_answer_and_models_still_stay_loaded(guarded: TritonServer) -> None:
    status, text = call(guarded, "/v2/repository/index", {}, KEY)
    assert status == 200 and "morph" in text
    status, text = call(guarded, "/v2/repository/models/morph/unload", {}, KEY)
    assert status >= 400 and "explicit" in text, "nobody loads or unloads models over the wire"
    assert generate(guarded, "abc", max_tokens=3)["text_output"] == "abc"


def test_grpc_needs_it_too(guarded: TritonServer) -> None:
    client = grpcclient.InferenceServerClient(f"127.0.0.1:{guarded.grpc}")
    with pytest.raises(InferenceServerException, match="restricted"):
        client.register_system_shared_memory("x", REGION["key"], 64)
    with pytest.raises(InferenceServerException, match="restricted"):
        client.get_model_repository_index()
    assert client.get_model_repository_index(headers={"triton-grpc-protocol-admin-key": KEY}).models
    client.close()
