"""The loop of ``morph chat``: read a line, send it or obey it, print the answer as it comes."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from morph_client.chat import Conversation, PromptFormat, Turn, context_named_in
from morph_client.cli.common import stderr
from morph_client.errors import BadInput, InvalidRequest, MorphError
from morph_client.sync_client import MorphClient
from morph_client.types import SamplingParams

_HELP = """\
/reset        forget the conversation (the system message stays)
/system TEXT  set the system message; without TEXT, remove it
/save FILE    write the conversation to a new JSON file
/help         this list
/exit         end, as Ctrl-D and Ctrl-C do
//TEXT        send /TEXT to the model
Ctrl-C breaks an answer off; what has come stays in the conversation."""


class ChatSession:
    """One conversation with one server. Answers go to standard output, everything else to standard error."""

    def __init__(
        self,
        client: MorphClient,
        form: PromptFormat,
        conversation: Conversation,
        sampling: SamplingParams,
        *,
        max_tokens: int,
        history: bool,
    ) -> None:
        self._client = client
        self._form = form
        self._conversation = conversation
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._history = history
        self._context = form.context
        self._told = 0  # how many forgotten turns the user knows of
        self._saved: set[Path] = set()
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._set_system,
            "/save": self._save,
            "/help": lambda _: self._note(_HELP),
        }

    def run(self) -> None:
        """Until the input ends or the user does.

        In a terminal, errors of one question are told and the chat goes on; else they are raised.
        """
        if self._interactive:
            importlib.import_module("readline")  # gives input() its line editing
            self._note(f"Chat with the model at {self._client.url} · /help lists the commands, Ctrl-D ends")
        while True:
            try:
                line = self._read()
                if line is None or line.split()[:1] == ["/exit"]:
                    return
                self._take(line)
            except MorphError as error:
                if not self._interactive:
                    raise
                stderr().print(f"morph: {error}", style="red", markup=False)

    def _read(self) -> str | None:
        """The next line without its end; ``None`` when there is none, or at Ctrl-C at the prompt."""
        try:
            if self._interactive:
                return input("> ")
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        except UnicodeDecodeError:
            raise BadInput("standard input is not UTF-8 text") from None
        except (EOFError, KeyboardInterrupt) as end:
            if not self._interactive and isinstance(end, KeyboardInterrupt):
                raise  # a script is told so by the exit status
            print()  # the prompt has no line end yet
            return None

    def _take(self, line: str) -> None:
        if line.startswith("//"):
            self._ask(line[1:])
        elif line.startswith("/"):
            name, _, rest = line.strip().partition(" ")
            if name not in self._commands:
                raise BadInput(f"there is no command {name}: /help lists them, and //… sends a line with a slash")
            self._commands[name](rest.strip())
        elif line.strip() or self._form.takes_empty:
            self._ask(line)

    def _ask(self, question: str) -> None:
        if not self._history:
            self._conversation.forget(len(self._conversation.sent))
            self._told = self._conversation.forgotten
        turn = self._answered(question)
        if turn.answer or not turn.interrupted:
            self._conversation.add(turn)

    def _answered(self, question: str) -> Turn:
        """Sends the question, with fewer of the old turns each time that the server finds the prompt too long."""
        while True:
            prompt = self._conversation.fitting_prompt(self._form, question, self._context, self._max_tokens)
            try:
                return self._stream(prompt, question)
            except InvalidRequest as refusal:
                context = context_named_in(refusal)
                if context is None or not self._conversation.sent:
                    raise
                self._context = context
                self._conversation.forget(1)

    def _stream(self, prompt: str, question: str) -> Turn:
        """Prints the answer as it comes. Ctrl-C cancels it on the server, and in a terminal the chat goes on."""
        out = sys.stdout
        parts: list[str] = []
        reason: str | None = None
        interrupted = False
        try:
            with self._client.stream(prompt, sampling=self._sampling, details=False) as chunks:
                for chunk in chunks:
                    if not parts:
                        self._tell_forgotten()
                    parts.append(chunk.text)
                    out.write(chunk.text)
                    out.flush()
                    reason = chunk.finish_reason
        except KeyboardInterrupt:  # leaving the stream has cancelled it
            if not self._interactive:
                raise
            interrupted = True
        finally:
            # What follows must not stand in the same line as the text, and a script gets one line end per answer.
            if parts or interrupted:
                out.write("\n")
                out.flush()
        answer = "".join(parts)
        if interrupted:
            self._note("(interrupted)" if answer else "(interrupted before the first word: the question is taken back)")
        elif reason == "length" and self._interactive:
            self._note(f"(stopped at --max-tokens {self._max_tokens})")
        return Turn(question, answer, interrupted)

    def _tell_forgotten(self) -> None:
        count = self._conversation.forgotten - self._told
        if count:
            turns = "the oldest turn is" if count == 1 else f"the {count} oldest turns are"
            self._note(f"({turns} no longer sent: the context of {self._context} tokens is full)")
        self._told = self._conversation.forgotten

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._told = 0
        self._note("(the conversation is forgotten)")

    def _set_system(self, text: str) -> None:
        self._conversation.system = text
        self._note("(the system message is set)" if text else "(there is no system message now)")

    def _save(self, name: str) -> None:
        if not name:
            raise BadInput("/save needs the name of a file")
        path = Path(name).expanduser()
        text = json.dumps({"messages": self._conversation.messages()}, indent=1, ensure_ascii=False)
        try:
            # Only a file of this very chat is written again.
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as file:
                file.write(text + "\n")
        except FileExistsError:
            raise BadInput(f"{path} exists already: /save writes a new file") from None
        except OSError as error:
            raise BadInput(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from None
        self._saved.add(path)
        self._note(f"({len(self._conversation.turns)} turns written to {path})")

    def _note(self, text: str) -> None:
        # A terminal's lines end between words; what goes to a file or a pipe is not cut.
        stderr().print(text, style="dim", markup=False, soft_wrap=not self._interactive)
