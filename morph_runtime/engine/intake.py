"""Requests on their way into the scheduler, and the sampling state that goes with each."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future

from morph_runtime.engine.messages import Finished
from morph_runtime.errors import IntegrityError, RequestError
from morph_runtime.sampling.rows import SamplingRow
from morph_runtime.scheduler import Request, Scheduler
from morph_runtime.structured.compiler import CompiledGrammar, GrammarCompiler


class Intake:
    """A request whose grammar is being compiled waits here; all others go to the scheduler at once.

    It keeps its place in the line, which is by priority and arrival. For the step loop's thread alone.
    """

    def __init__(self, scheduler: Scheduler, grammars: GrammarCompiler) -> None:
        self._scheduler = scheduler
        self._grammars = grammars
        self._compiling: dict[int, tuple[Request, Future[CompiledGrammar]]] = {}
        self._rows: dict[int, SamplingRow] = {}

    def submit(self, request: Request) -> None:
        """Take a new request."""
        wanted = request.sampling.structured_outputs
        if wanted is None:
            self._rows[request.key] = SamplingRow(request.sampling, request)
            self._scheduler.add(request)
        else:
            self._compiling[request.key] = (request, self._grammars.compile(wanted))

    def admit(self) -> list[Finished]:
        """Pass on the requests whose grammar is ready; returns the ends of those whose grammar was refused."""
        refused: list[Finished] = []
        for key in [key for key, (_, future) in self._compiling.items() if future.done()]:
            request, future = self._compiling.pop(key)
            try:
                matcher = future.result().matcher()
            except RequestError as error:
                refused.append(Finished(key, "invalid", str(error)))
                continue
            self._rows[key] = SamplingRow(request.sampling, request, matcher)
            self._scheduler.add(request)
        return refused

    def cancel(self, key: int) -> Request | None:
        """End a request wherever it is; None if it is unknown (already finished)."""
        if key in self._compiling:
            return self._compiling.pop(key)[0]
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
    def num_compiling(self) -> int:
        """Requests that wait for their grammar."""
        return len(self._compiling)

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
