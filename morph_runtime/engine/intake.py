"""Requests on their way into the scheduler, and the sampling state that goes with each."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import NamedTuple

from morph_runtime.engine.messages import Finished
from morph_runtime.errors import IntegrityError, RequestError
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.scheduler import Request, Scheduler
from morph_runtime.structured.compiler import CompiledGrammar, GrammarCompiler


class Held(NamedTuple):
    """A request that may not enter yet: its grammar is being compiled, or the request `after` computes its prompt."""

    request: Request
    grammar: Future[CompiledGrammar] | None
    after: int


class Intake:
    """A request that must wait for its grammar or for another's prompt waits here; all others enter at once.

    It keeps its place in the line, which is by priority and arrival. For the step loop's thread alone.
    """

    def __init__(self, scheduler: Scheduler, grammars: GrammarCompiler, *, share_prompts: bool = False) -> None:
        """`share_prompts`: what one request has computed of its prompt serves another (the prefix cache is on)."""
        self._scheduler = scheduler
        self._grammars = grammars
        self._share_prompts = share_prompts
        self._held: dict[int, Held] = {}
        self._rows: dict[int, SamplingRow] = {}

    def submit(self, request: Request, after: int = 0) -> None:
        """Take a new request; with `share_prompts` it waits until the prompt of the request `after` was computed."""
        wanted = request.sampling.structured_outputs
        grammar = None if wanted is None else self._grammars.compile(wanted)
        held = Held(request, grammar, after if self._share_prompts else 0)
        if grammar is None and self._is_computed(held.after):
            self._enter(held)
        else:
            self._held[request.key] = held

    def admit(self) -> list[Finished]:
        """Pass on the requests that need wait no more; returns the ends of those whose grammar was refused."""
        refused: list[Finished] = []
        for key, held in tuple(self._held.items()):
            if (held.grammar is None or held.grammar.done()) and self._is_computed(held.after):
                del self._held[key]
                try:
                    self._enter(held)
                except RequestError as error:
                    refused.append(Finished(key, "invalid", str(error)))
        return refused

    def cancel(self, key: int) -> Request | None:
        """End a request wherever it is; None if it is unknown (already finished)."""
        if key in self._held:
            return self._held.pop(key).request
        self._rows.pop(key, None)
        return self._scheduler.cancel(key)

    def rows(self, requests: Iterable[Request]) -> list[SamplingRow]:
        """The sampling state of requests that are in the scheduler."""
        rows = self._rows
        return [rows[request.key] for request in requests]

    def failures(self, requests: Iterable[Request]) -> list[tuple[Request, str]]:
        """Those whose grammar can go no further, each with a sentence for its client. Ended requests have none."""
        failed = []
        for request in requests:
            row = self._rows.get(request.key)
            if row is not None and row.matcher is not None and (detail := row.matcher.error):
                failed.append((request, detail))
        return failed

    def forget(self, key: int) -> None:
        """A request has finished."""
        self._rows.pop(key, None)

    @property
    def num_held(self) -> int:
        """Requests that wait for their grammar or for another's prompt."""
        return len(self._held)

    def check_integrity(self) -> None:
        """The scheduler's requests and nobody else have sampling state.

        Raises:
            IntegrityError: the books do not agree.
        """
        known = self._scheduler.num_running + self._scheduler.num_waiting
        if len(self._rows) != known:
            raise IntegrityError(f"There is sampling state of {len(self._rows)} requests, the scheduler has {known}.")

    def close(self) -> None:
        """End the compiler's thread."""
        self._grammars.close()

    def _is_computed(self, key: int) -> bool:
        """Whether a request's prompt was computed and recorded, as it is once its first token is known.

        True as well of a request that has ended, and of 0, which means nobody.
        """
        if key == 0:
            return True
        row = self._rows.get(key)
        if row is None:
            return key not in self._held
        tokens, first = row.sequence.tokens, row.sequence.prompt_len
        return len(tokens) > first and tokens[first] >= 0

    def _enter(self, held: Held) -> None:
        """Hand a request to the scheduler. Raises RequestError if its grammar was refused."""
        matcher = None if held.grammar is None else held.grammar.result().matcher()
        request = held.request
        self._rows[request.key] = SamplingRow(request.sampling, request, matcher)
        self._scheduler.add(request)
