"""From the engine's tokens to responses: detokenize, join what has piled up, send, end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from morph_backend.channel import Status
from morph_backend.open_request import End, OpenRequest, Output, Tokens
from morph_backend.outputs import OutputNews, ResponseContent, output_tensors
from morph_backend.rungs import RungShares

UNHEALTHY = "Model is unavailable due to unhealthy vLLM engine"
"""The words of Triton's vLLM backend, which its clients know."""


class RequestBook(Protocol):
    """Who keeps the open requests."""

    def closed(self, request: OpenRequest, outcome: str) -> None:
        """A request's FINAL is out."""

    def stop(self, output: Output) -> None:
        """An output has ended in the serving process: the engine need not go on with it."""


class Responder:
    """The work of a sender thread for one request. A request is handled by one thread only."""

    def __init__(
        self,
        book: RequestBook,
        shares: RungShares,
        counted: Callable[[int, Sequence[float]], None],
        spelling: Callable[[int], str],
    ) -> None:
        """`counted` is told of each group of tokens that counts as output: how many, and by rung; `spelling` is a
        token's text."""
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
        for event in events:
            output = request.outputs[event.output]
            if isinstance(event, End):
                output.ended = True
                failed = event.reason not in ("stop", "length") and output.finish_reason is None
                if failed or event.reason == "down":
                    self.fail(request, event)
                    return
            if output.finish_reason is not None:
                continue  # a stop string has ended it, and the engine went on until it was told
            if isinstance(event, Tokens):
                self._take(output, event)
            else:
                rest = output.assembler.flush()
                output.unsent_text.append(rest.text)
                output.finish_reason = rest.finish_reason or event.reason
        if all(output.finish_reason for output in request.outputs):
            if self._send(request, final=True):
                self._book.closed(request, _outcome(request))
            return
        for output in request.outputs:
            if output.finish_reason and not output.ended:
                self._book.stop(output)
        if request.given.stream and any(map(any, (output.unsent_text for output in request.outputs))):
            self._send(request, final=False)

    def fail(self, request: OpenRequest, end: End) -> None:
        """End a request with an error, whichever of its outputs it hit."""
        if end.reason == "cancelled":
            status, message, outcome = Status.CANCELLED, "Request was cancelled", "cancelled"
        elif end.reason == "invalid":
            status, message, outcome = Status.INVALID_ARG, end.detail, "rejected"
        elif end.reason == "down":
            status, message, outcome = Status.UNAVAILABLE, f"{UNHEALTHY}: {end.detail}", "error"
        else:
            status, message, outcome = Status.INTERNAL, end.detail or "The engine could not finish it.", "error"
        if request.channel.fail(status, message):
            self._book.closed(request, outcome)

    def _take(self, output: Output, new: Tokens) -> None:
        """Book new tokens of an output that has not ended."""
        delta = output.assembler.push(new.tokens)
        levels = new.levels[: delta.n_tokens]
        scores = new.logprobs[: delta.n_tokens]
        output.tokens.extend(new.tokens[: delta.n_tokens])
        output.unsent_logprobs.extend(scores)
        output.unsent_history.extend(new.history)
        output.cumulative_logprob += sum(at.values[0] for at in scores)
        by_rung = self._shares.total(levels)
        output.rung_tokens = [sum(pair) for pair in zip(output.rung_tokens, by_rung, strict=True)]
        output.unsent_levels.extend(levels)
        if levels:
            self._counted(len(levels), by_rung)
        output.unsent_text.append(delta.text)
        output.finish_reason = delta.finish_reason

    def _send(self, request: OpenRequest, *, final: bool) -> bool:
        given = request.given
        prompt = given.text if given.echo else ""
        news = [
            OutputNews(
                text=prompt + "".join(output.unsent_text),
                finish_reason=output.finish_reason,
                levels=output.unsent_levels,
                rung_tokens=output.rung_tokens,
                logprobs=None if given.sampling.logprobs is None else output.unsent_logprobs,
                cumulative_logprob=output.cumulative_logprob,
                history=output.unsent_history,
            )
            for output in request.outputs
        ]
        # Another output may have text before the first one's prompt is scored; one token has nothing to score.
        scored = bool(request.prompt_logprobs) or len(request.prompt) == 1
        tell = scored and not request.prompt_told and given.sampling.prompt_logprobs is not None
        request.prompt_told = request.prompt_told or tell
        content = ResponseContent(
            news,
            len(request.prompt),
            request.cached_tokens,
            request.prompt_logprobs if tell else None,
            request.recomputed_at,
            whole=not (given.lean_chunks and request.begun) or any(output.finish_reason for output in request.outputs),
        )
        request.begun = True
        tensors = output_tensors(content, given.wants, self._spelling)
        for output in request.outputs:
            output.unsent_text, output.unsent_levels, output.unsent_logprobs = [], [], []
            output.unsent_history = []
        return request.channel.send(tensors, final=final)


def _outcome(request: OpenRequest) -> str:
    """`length` if any output was cut off."""
    return "length" if any(output.finish_reason == "length" for output in request.outputs) else "stop"
