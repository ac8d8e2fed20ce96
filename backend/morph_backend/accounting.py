"""What is counted about requests."""

from __future__ import annotations

from morph_backend.open_request import OpenRequest, Output
from morph_backend.recorder import MetricsRecorder
from morph_backend.rungs import RUNGS, RungShares

OUTCOMES = ("stop", "length", "cancelled", "rejected", "error")


class RequestAccounting:
    """Writes request and token metrics into the recorder. Safe to use from several threads."""

    def __init__(self, recorder: MetricsRecorder, shares: RungShares) -> None:
        self._recorder = recorder
        self._shares = shares
        for outcome in OUTCOMES:
            recorder.declare("morph_requests_total", outcome=outcome)
        for rung in RUNGS:
            recorder.declare("morph_tokens_total", rung=rung)
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

    def generated(self, levels: list[int]) -> None:
        """Output tokens at `levels` count."""
        self._recorder.count("vllm:generation_tokens_total", len(levels))
        by_rung = [0.0, 0.0, 0.0]
        self._shares.add(by_rung, levels)
        for rung, tokens in zip(RUNGS, by_rung, strict=True):
            self._recorder.count("morph_tokens_total", tokens, rung=rung)

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
