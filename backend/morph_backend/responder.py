"""From the engine's tokens to responses: detokenize, join what has piled up, send, end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from morph_backend.channel import Status
from morph_backend.open_request import End, OpenRequest, Tokens
from morph_backend.outputs import ResponseContent, output_tensors
from morph_backend.rungs import RungShares

UNHEALTHY = "Model is unavailable due to unhealthy vLLM engine"
"""The words of Triton's vLLM backend, which its clients know."""


class RequestBook(Protocol):
    """Who keeps the open requests."""

    def closed(self, request: OpenRequest, outcome: str, *, running: bool) -> None:
        """A request's FINAL is out; `running` if the engine still works on it."""


class Responder:
    """The work of a sender thread for one request. A request is handled by one thread only."""

    def __init__(
        self,
        book: RequestBook,
        shares: RungShares,
        counted: Callable[[list[int]], None],
        spelling: Callable[[int], str],
    ) -> None:
        """`counted` is told the levels of each group of tokens that counts as output; `spelling` is a token's text."""
        self._book = book
        self._shares = shares
        self._counted = counted
        self._spelling = spelling

    def respond(self, request: OpenRequest) -> None:
        """Send what the request's inbox holds.

        The first text goes out at once; when a stream falls behind, all that has come meanwhile is
        one response. There are no empty responses, but for the last of an output that has no text.
        """
        events = request.take()
        if not events or request.channel.closed:
            return
        groups = [event for event in events if isinstance(event, Tokens)]
        new = Tokens(
            [token for group in groups for token in group.tokens],
            [level for group in groups for level in group.levels],
            [scores for group in groups for scores in group.logprobs],
        )
        end = next((event for event in events if isinstance(event, End)), None)
        finish = self._take(request, new)
        if finish is not None:
            self._finish(request, finish, running=end is None)
        elif end is None:
            if request.given.stream and request.unsent_text:
                self._send(request, None)
        elif end.reason in ("stop", "length"):
            rest = request.assembler.flush()
            if rest.text:
                request.unsent_text.append(rest.text)
            self._finish(request, rest.finish_reason or end.reason, running=False)
        else:
            self.fail(request, end)

    def fail(self, request: OpenRequest, end: End) -> None:
        """End a request with an error."""
        if end.reason == "cancelled":
            status, message, outcome = Status.CANCELLED, "Request was cancelled", "cancelled"
        elif end.reason == "invalid":
            status, message, outcome = Status.INVALID_ARG, end.detail, "rejected"
        elif end.reason == "down":
            status, message, outcome = Status.UNAVAILABLE, f"{UNHEALTHY}: {end.detail}", "error"
        else:
            status, message, outcome = Status.INTERNAL, end.detail or "The engine could not finish it.", "error"
        if request.channel.fail(status, message):
            self._book.closed(request, outcome, running=False)

    def _take(self, request: OpenRequest, new: Tokens) -> str | None:
        """Book new tokens; returns `stop` if a stop string ends the output."""
        delta = request.assembler.push(new.tokens)
        levels = new.levels[: delta.n_tokens]
        scores = new.logprobs[: delta.n_tokens]
        request.tokens.extend(new.tokens[: delta.n_tokens])
        request.unsent_logprobs.extend(scores)
        request.cumulative_logprob += sum(at.values[0] for at in scores)
        self._shares.add(request.rung_tokens, levels)
        request.unsent_levels.extend(levels)
        if levels:
            self._counted(levels)
        if delta.text:
            request.unsent_text.append(delta.text)
        return delta.finish_reason

    def _finish(self, request: OpenRequest, reason: str, *, running: bool) -> None:
        if self._send(request, reason):
            self._book.closed(request, reason, running=running)

    def _send(self, request: OpenRequest, finish_reason: str | None) -> bool:
        text = "".join(request.unsent_text)
        content = ResponseContent(
            text=request.given.text + text if request.given.echo else text,
            finish_reason=finish_reason,
            num_input_tokens=len(request.prompt),
            num_cached_tokens=request.cached_tokens,
            levels=request.unsent_levels,
            rung_tokens=request.rung_tokens,
            logprobs=None if request.given.sampling.logprobs is None else request.unsent_logprobs,
            cumulative_logprob=request.cumulative_logprob,
        )
        tensors = output_tensors(content, request.given.wants, self._spelling)
        request.unsent_text, request.unsent_levels, request.unsent_logprobs = [], [], []
        return request.channel.send(tensors, final=finish_reason is not None)
