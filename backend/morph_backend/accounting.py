"""What is counted about requests."""

from __future__ import annotations

from collections.abc import Sequence

from morph_backend.open_request import OpenRequest, Output
from morph_backend.recorder import MetricsRecorder, counter_key
from morph_backend.rungs import RUNGS

OUTCOMES = ("stop", "length", "cancelled", "rejected", "error")


class RequestAccounting:
    """Writes request and token metrics into the recorder. Safe to use from several threads."""

    def __init__(self, recorder: MetricsRecorder) -> None:
        self._recorder = recorder
        for outcome in OUTCOMES:
            recorder.declare("morph_requests_total", outcome=outcome)
        for rung in RUNGS:
            recorder.declare("morph_tokens_total", rung=rung)
        self._generated = [
            counter_key("vllm:generation_tokens_total"),
            *(counter_key("morph_tokens_total", rung=rung) for rung in RUNGS),
        ]
        for counter in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total"):
            recorder.declare(counter)

    def started(self, request: OpenRequest) -> None:
        """The engine has begun with the prompt."""
        self._recorder.count("vllm:prompt_tokens_total", len(request.prompt))

    def arrived(self, request: OpenRequest, output: Output, count: int, now: float) -> list[float]:
        """`count` tokens of an output have come from the engine at `now` (monotonic seconds); reader thread only.

        Returns:
            The seconds per output token of these, to be told to `paced` with those of the step's other outputs.
        """
        if output.last_token_s == 0.0:
            if not any(other.last_token_s for other in request.outputs):
                self._recorder.observe("vllm:time_to_first_token_seconds", now - request.arrival_s)
            output.last_token_s = now
            count -= 1
        gap_s = now - output.last_token_s
        output.last_token_s = now
        return [gap_s / count] * count if count else []

    def paced(self, seconds: list[float]) -> None:
        """Seconds per output token of a step's tokens: together, for the senders want the recorder's lock too, and one
        turn of it for every stream costs a step several times its own work (`bench/serving/backend_cost.py`)."""
        self._recorder.observe("vllm:time_per_output_token_seconds", *seconds)

    def generated(self, count: int, by_rung: Sequence[float]) -> None:
        """`count` output tokens count; `by_rung`: the same in the order of `RUNGS`."""
        self._recorder.count_all(zip(self._generated, (count, *by_rung), strict=True))

    def ended(self, request: OpenRequest, outcome: str, now: float) -> None:
        """The request's FINAL is out."""
        self.outcome(outcome)
        if outcome in ("stop", "length"):
            self._recorder.observe("vllm:e2e_request_latency_seconds", now - request.arrival_s)
            self._recorder.observe("vllm:request_prompt_tokens", len(request.prompt))
            self._recorder.observe("vllm:request_params_n", len(request.outputs))
            for output in request.outputs:
                self._recorder.observe("vllm:request_generation_tokens", len(output.tokens))

    def outcome(self, outcome: str) -> None:
        """A request has ended in this way."""
        self._recorder.count("morph_requests_total", outcome=outcome)
