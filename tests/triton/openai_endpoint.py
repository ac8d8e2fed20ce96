"""`morph openai` as users start it, for tests: a process of its own in front of a real server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai

from triton_server import ROOT, TritonServer, free_ports

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }} {% endfor %}[assistant] {{ mood }}"
)


def write_chat_folder(folder: Path, tokenizer_from: Path, context: int) -> Path:
    """A folder with a model's tokenizer and a chat template: all that the endpoint reads."""
    folder.mkdir()
    shutil.copy(tokenizer_from / "tokenizer.json", folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": context, "model_type": "llama"}))
    return folder


class Endpoint:
    """One `morph openai`."""

    def __init__(self, server: TritonServer, folder: Path, *arguments: str) -> None:
        (self.port,) = free_ports(1)
        self.log = folder / f"openai-{self.port}.log"
        self._file = self.log.open("wb")
        command = ["openai", "--port", str(self.port), "--url", f"127.0.0.1:{server.grpc}", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from morph_client.cli import main; main()", *command],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("MORPH_")},
                "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}",
            },
            stdout=self._file,
            stderr=subprocess.STDOUT,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self, timeout_s: float = 110.0) -> Endpoint:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            if self.health() == 200:
                return self
            time.sleep(0.05)
        raise AssertionError(f"not ready in {timeout_s} s: {self.log.read_text()}")

    def health(self) -> int:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(100)
        finally:
            self.process.kill()
            self._file.close()
