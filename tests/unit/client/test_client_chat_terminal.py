"""``morph chat`` in a terminal of its own: a pseudo-terminal with job control, so that Ctrl-C is a key press."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from client_fakes import FakeTriton

# Opening its own terminal as the leader of a session makes it the controlling one.
PROGRAM = "import os, sys; os.open(os.ttyname(0), os.O_RDWR); from morph_client.cli import main; main()"
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    def __init__(self, *arguments: str) -> None:
        self._master, slave = os.openpty()
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "chat", *arguments],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment,
        )  # fmt: skip
        os.close(slave)
        self._text = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def until(self, words: str, timeout_s: float = 100.0) -> str:
        """What came up to and with ``words``, since the last call."""
        end = time.monotonic() + timeout_s
        while words not in self._text:
            ready, _, _ = select.select([self._master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{words!r} did not come, but {self._text!r}"
            self._text += os.read(self._master, 4096).decode()
        seen, _, self._text = self._text.partition(words)
        return seen + words

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_ctrl_c_cancels_the_answer_on_the_server_and_returns_to_the_prompt(
    terminal: Callable[..., Terminal], triton: FakeTriton, tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    screen = terminal("--raw", "--url", triton.url, "--max-tokens", "900")
    screen.until("> ")
    screen.type("slow story\n")
    screen.until("w3 ")
    screen.type(CTRL_C)
    assert triton.service.cancelled.acquire(timeout=60), "the server was not told"
    screen.until("(interrupted)")
    screen.until("> ")
    screen.type(f"/save {path}\n")
    screen.until("1 turns written")
    answer = json.loads(path.read_text())["messages"][-1]
    assert answer["interrupted"] is True and answer["content"].startswith("w0 w1 w2 w3 ")
    screen.until("> ")
    screen.type("/exit\n")
    assert screen.process.wait(100) == 0


def test_ctrl_c_before_the_first_word_takes_the_question_back(
    terminal: Callable[..., Terminal], triton: FakeTriton
) -> None:
    screen = terminal("--raw", "--url", triton.url, "--max-tokens", "2")
    screen.until("> ")
    screen.type("hang\n")
    assert triton.service.arrived.acquire(timeout=60)
    screen.type(CTRL_C)
    screen.until("taken back")
    screen.until("> ")
    screen.type("go\n")
    screen.until("w0 w1 ")
    assert triton.service.requests[-1].raw_input_contents[0][4:] == b"go"


def test_an_error_is_told_and_the_chat_goes_on(terminal: Callable[..., Terminal], triton: FakeTriton) -> None:
    screen = terminal("--raw", "--url", triton.url, "--max-tokens", "2")
    screen.until("> ")
    screen.type("refuse this\n")
    screen.until("morph: temperature must be at least 0")
    screen.until("> ")
    screen.type("go\n")
    screen.until("w0 w1 ")
    screen.until("(stopped at --max-tokens 2)")


@pytest.mark.parametrize("key", [CTRL_C, CTRL_D])
def test_ctrl_c_and_ctrl_d_at_the_prompt_end_the_chat(terminal: Callable[..., Terminal], key: str) -> None:
    screen = terminal("--raw", "--url", "localhost:9")
    screen.until("> ")
    screen.type(key)
    # input() of CPython with readline misses a Ctrl-C in the microseconds between writing the prompt and waiting for
    # a key, which no hand is fast enough for, but this test is: then the next one counts.
    try:
        status = screen.process.wait(10 if key == CTRL_C else 100)
    except subprocess.TimeoutExpired:
        assert key == CTRL_C
        screen.type(key)
        status = screen.process.wait(100)
    assert status == 0


def test_in_a_pipe_an_interrupt_cancels_the_answer_and_ends_with_its_status(triton: FakeTriton) -> None:
    command = [sys.executable, "-c", "from morph_client.cli import main; main()", "chat", "--raw", "--url", triton.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("slow story\nnever\n")
        process.stdin.flush()
        assert process.stdout.read(3) == "w0 "
        process.send_signal(signal.SIGINT)
        assert triton.service.cancelled.acquire(timeout=60), "the server was not told"
        assert process.wait(100) == 130
    assert len(triton.service.requests) == 1
