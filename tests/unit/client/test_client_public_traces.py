"""``morph traces``: downloads are checked, licences come with them, and a name finds its file. No network is used."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from morph_client import trace_store
from morph_client.cli import traces as command
from morph_client.errors import BadInput
from morph_client.trace_store import CATALOGUE, find_trace
from morph_client.traces import read_trace

Morph = Callable[..., Any]
CSV = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,4808,10\n2023-11-16 18:17:04.03,3180,8\n"


class Publisher:
    """A web server with files; remembers what it was asked for."""

    def __init__(self) -> None:
        self.files = {"/AzureLLMInferenceTrace_code.csv": CSV, "/LICENSE": b"Attribution 4.0 International"}
        self.asked: list[str] = []
        publisher = self

        class Pages(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                publisher.asked.append(self.path)
                content = publisher.files.get(self.path)
                self.send_response(404 if content is None else 200)
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *_: object) -> None:
                """Says nothing: test output is for failures."""

        self.server = ThreadingHTTPServer(("localhost", 0), Pages)
        threading.Thread(target=self.server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server.server_address[1]}"


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Publisher]:
    """A local publisher of ``azure-code``, and a cache folder of its own."""
    small = replace(CATALOGUE[0], sha256=hashlib.sha256(CSV).hexdigest(), size=len(CSV))
    for module in (trace_store, command):
        monkeypatch.setattr(module, "CATALOGUE", (small, *CATALOGUE[1:]))
    monkeypatch.setenv("MORPH_CACHE", str(tmp_path / "cache"))
    one = Publisher()
    yield one
    one.server.shutdown()
    one.server.server_close()


def sentence(result: Any) -> str:
    lines = result.stderr.strip().splitlines()
    assert result.exit_code != 0 and len(lines) == 1 and lines[0].startswith("morph: "), result.stderr
    return str(lines[0])


def test_a_trace_is_downloaded_once_with_its_licence_and_found_by_name(
    morph: Morph, publisher: Publisher, tmp_path: Path
) -> None:
    result = morph("traces", "get", "azure-code", "--mirror", publisher.url)
    assert result.exit_code == 0, result.stderr
    assert "CC-BY 4.0" in result.stdout and "Splitwise" in result.stdout
    found = find_trace("azure-code")
    assert read_trace(found).format == "azure-2023"
    assert "Attribution" in (found.parent / "LICENSE").read_text()
    assert "github" in (found.parent / "SOURCE").read_text()
    assert "yes" in morph("traces", "list").stdout
    assert morph("traces", "get", "azure-code", "--mirror", publisher.url).exit_code == 0
    assert publisher.asked.count("/AzureLLMInferenceTrace_code.csv") == 1


def test_a_file_that_is_not_the_published_one_is_refused_and_not_kept(morph: Morph, publisher: Publisher) -> None:
    publisher.files["/AzureLLMInferenceTrace_code.csv"] = CSV + b"x"
    said = sentence(morph("traces", "get", "azure-code", "--mirror", publisher.url))
    assert "is not the file that was published: its sha256 is" in said
    assert not list(trace_store.cache_folder().rglob("*Trace*"))
    assert "morph traces get azure-code" in sentence(morph("replay", "azure-code", "--url", "localhost:9"))


def test_without_a_network_there_is_one_sentence_with_the_remedy(morph: Morph, publisher: Publisher) -> None:
    assert "--mirror" in sentence(morph("traces", "get", "azure-code", "--mirror", "http://localhost:9"))
    assert "status 404" in sentence(morph("traces", "get", "azure-conv", "--mirror", publisher.url))
    assert "http://host/folder" in sentence(morph("traces", "get", "azure-code", "--mirror", "file:///etc"))
    assert "known are azure-code" in sentence(morph("traces", "get", "azure"))


def test_a_cache_that_cannot_be_written_is_one_sentence(
    morph: Morph, publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MORPH_CACHE", str(tmp_path / "file"))
    assert "cannot write to" in sentence(morph("traces", "get", "azure-code", "--mirror", publisher.url))


def test_a_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publisher: Publisher) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="not downloaded yet"):
        find_trace("azure-conv")
    Path("azure-conv").write_bytes(CSV)
    assert find_trace("azure-conv") == Path("azure-conv")
    assert find_trace("other.csv") == Path("other.csv")


def test_the_catalogue_names_publisher_licence_and_checksum() -> None:
    for trace in CATALOGUE:
        assert trace.url.startswith("https://") and trace.licence_url.endswith("/LICENSE")
        assert len(trace.sha256) == 64 and trace.size > 100_000 and trace.cite and trace.licence
    assert len({trace.name for trace in CATALOGUE}) == len(CATALOGUE)
