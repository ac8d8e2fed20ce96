"""One request as a client sees it, from its first byte to its end."""

from __future__ import annotations

import http.client
import json
import queue
import time
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.plan import PROMPTS, Ask
from tests.chaos.replay import Told
from triton_server import TritonServer
from wire_client import GrpcStream

FLAGS = ("return_finish_reason", "return_num_output_tokens", "return_morph_level")
TRACE = ("return_level_history", "return_logprobs")
"""What a replay needs besides."""


@dataclass
class Seen:
    """What came of a request.

    Attributes:
        pieces: the text of each response.
        levels: the level of each token, by response.
        told: the tokens, their log probabilities and the history of their levels, if asked for.
        tokens: their number, as the server counts.
        times_s: when each response came, seconds since the request.
        ends: responses that said they are the last.
        error: the server's words.
        left: the client went away on purpose.
        hung: nothing came for too long.
        ended_s: when it was over.
    """

    ask: Ask
    began_s: float = field(default_factory=time.monotonic)
    pieces: list[str] = field(default_factory=list)
    levels: list[list[int]] = field(default_factory=list)
    told: Told = field(default_factory=Told)
    tokens: int = 0
    times_s: list[float] = field(default_factory=list)
    ends: int = 0
    error: str = ""
    left: bool = False
    hung: bool = False
    ended_s: float = 0.0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def take(self, text: str, levels: list[int], tokens: int, last: bool) -> None:
        """One response."""
        self.pieces.append(text)
        self.levels.append(levels)
        self.tokens += tokens
        self.times_s.append(time.monotonic())
        self.ends += last

    def take_trace(self, logprobs: str, history: str) -> None:
        """What a response says for the replay."""
        for scores in json.loads(logprobs):
            token, chosen = next(iter(scores.items()))
            self.told.tokens.append(int(token))
            self.told.logprobs.append(chosen["logprob"])
        self.told.runs.extend(tuple(run) for run in json.loads(history))

    def longest_pause_s(self, since_s: float) -> float | None:
        """The longest pause between two responses that begins within half a second of the given time, or holds it.

        None if the stream was not open then: what was on its way when an engine ended still comes after that.
        """
        pauses = [
            after - before
            for before, after in zip([self.began_s, *self.times_s], self.times_s, strict=False)
            if before < since_s + 0.5 and after >= since_s
        ]
        return max(pauses) if pauses and self.began_s < since_s < self.times_s[-1] else None


def run(server: TritonServer, ask: Ask, patience_s: float, trace: bool = False) -> Seen:
    """Send one request and see it through, or leave it as it says; `trace` asks for what a replay needs."""
    seen = Seen(ask)
    try:
        if ask.way.startswith("grpc"):
            _grpc(server, ask, seen, patience_s, trace)
        elif ask.way.startswith("sse"):
            _sse(server, ask, seen, patience_s, trace)
        else:
            _generate(server, ask, seen, patience_s, trace)
    except (queue.Empty, TimeoutError):
        seen.hung = True
    except (OSError, http.client.HTTPException) as error:
        seen.error = f"{type(error).__name__}: {error}"
    seen.ended_s = time.monotonic()
    return seen


def _wishes(ask: Ask, trace: bool) -> tuple[dict[str, Any], dict[str, bool]]:
    """Sampling parameters and flags of a request."""
    flags = dict.fromkeys((*FLAGS, *TRACE) if trace else FLAGS, True)
    return ({**ask.sampling, "logprobs": 0} if trace else ask.sampling), flags


def _grpc(server: TritonServer, ask: Ask, seen: Seen, patience_s: float, trace: bool) -> None:
    stream = GrpcStream(server)
    try:
        sampling, flags = _wishes(ask, trace)
        stream.ask(PROMPTS[ask.prompt], sampling, **flags)
        while not seen.ends:
            if "cancel" in ask.way and len(seen.pieces) >= ask.leave_after:
                seen.left = True
                stream.cancel()
                return
            response = stream.next(patience_s)
            if response.error:
                seen.error = response.error
                return
            if response.outputs:
                finish = response.outputs["finish_reason"][0] != "None"
                assert finish == response.final, "the last text is not the last response"
                if trace:
                    seen.take_trace(response.outputs["logprobs"][0], response.outputs["level_history"][0])
                seen.take(
                    response.outputs["text_output"][0], list(response.outputs["morph_level"]),
                    response.outputs["num_output_tokens"][0], response.final,
                )  # fmt: skip
    finally:
        stream.close()


def _body(ask: Ask, stream: bool, trace: bool) -> bytes:
    sampling, flags = _wishes(ask, trace)
    rest = {"sampling_parameters": json.dumps(sampling), "stream": stream, "exclude_input_in_output": True}
    return json.dumps({"text_input": PROMPTS[ask.prompt], **rest, **flags}).encode()


def _take_json(seen: Seen, event: dict[str, Any]) -> None:
    levels = event["morph_level"]
    if "level_history" in event:
        seen.take_trace(event["logprobs"], event["level_history"])
    seen.take(
        event["text_output"], levels if isinstance(levels, list) else [levels], event["num_output_tokens"],
        event["finish_reason"] != "None",
    )  # fmt: skip


def _sse(server: TritonServer, ask: Ask, seen: Seen, patience_s: float, trace: bool) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=patience_s)
    try:
        connection.request("POST", "/v2/models/morph/generate_stream", _body(ask, True, trace))
        answer = connection.getresponse()
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                seen.error = event["error"]
                return
            _take_json(seen, event)
            if "drop" in ask.way and len(seen.pieces) >= ask.leave_after:
                seen.left = True
                answer.close()
                return
    finally:
        connection.close()


def _generate(server: TritonServer, ask: Ask, seen: Seen, patience_s: float, trace: bool) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=patience_s)
    try:
        connection.request("POST", "/v2/models/morph/generate", _body(ask, False, trace))
        answer = connection.getresponse()
        body = json.loads(answer.read())
        if answer.status != 200:
            seen.error = body["error"]
        else:
            _take_json(seen, body)
    finally:
        connection.close()
