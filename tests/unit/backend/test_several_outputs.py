"""Requests with `n` outputs, with the deterministic engine: each output says the prompt over and over."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from backend.test_service import until
from fake_engine import EOS_ID, SEED_FAIL, SEED_STOP_EARLY, FakeEngine
from morph_backend.fan_out import SEED_RANGE, sampling_of
from morph_backend.inputs import read_request
from morph_backend.recorder import MetricsRecorder
from morph_backend.service import Service
from morph_runtime.config import EngineConfig
from morph_runtime.engine.messages import Finished, SamplingParams, StepOutput, TokenDelta, TokenLogprobs
from morph_runtime.text.tokenizer import Tokenizer
from tiny_model import tiny_tokenizer

FLAGS = dict.fromkeys(
    ("return_finish_reason", "return_cumulative_logprob", "return_logprobs", "return_num_input_tokens",
     "return_num_output_tokens", "return_morph_level", "return_rung_share", "return_num_cached_tokens"), True,
)  # fmt: skip


class House:
    def __init__(self, make_sender: Any, make_request: Any) -> None:
        self.recorder = MetricsRecorder()
        self.service = Service(Tokenizer(tiny_tokenizer()), self.recorder, line=2)
        self.engine = FakeEngine(EngineConfig.from_mapping({"scheduler": {"max_num_seqs": 4}}), self.service)
        self.engine.step_s = 0.002
        self.service.attach(self.engine, self.engine.start())
        self._make_sender, self._make_request = make_sender, make_request

    def ask(self, n: int, **given: Any) -> Any:
        """Handle a request; returns its sender."""
        sampling = {k: v for k, v in given.items() if not k.startswith(("return_", "exclude_")) and k != "stream"}
        inputs = {"exclude_input_in_output": True} | {k: v for k, v in given.items() if k not in sampling}
        text = json.dumps({"max_tokens": 8, **sampling, "n": n})
        sender = self._make_sender()
        request = self._make_request(text_input="hello world", sampling_parameters=text, **inputs)
        self.service.handle(sender, functools.partial(read_request, request))
        return sender

    def ask_held(self, n: int, **given: Any) -> Any:
        """As `ask`, but a stream's first response goes out alone: a busy machine may join the others."""
        self.engine.held.set()
        sender = self.ask(n, **given)
        self.engine.release_when(lambda: sender.responses or not given.get("stream"))
        return sender

    def freeze(self) -> None:
        """Stop the engine's own steps; the test speaks for it from now on."""
        self.engine._stop.set()
        self.engine._thread.join()
        self.engine._stop.clear()


@pytest.fixture
def house(make_sender: Any, make_request: Any) -> Iterator[House]:
    house = House(make_sender, make_request)
    yield house
    house.service.close()


def finished(sender: Any) -> Any:
    assert sender.done.wait(60)
    assert (sender.finals, sender.misuse) == (1, [])
    return sender


def texts(sender: Any) -> list[str]:
    """The text of each output, joined over the responses."""
    parts = [[item.decode() for item in response.outputs["text_output"]] for response in sender.responses]
    return ["".join(column) for column in zip(*parts, strict=True)]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_every_output_has_an_entry_for_each_of_n(house: House, n: int, stream: bool, logprobs: int | None) -> None:
    sender = finished(house.ask_held(n, stream=stream, logprobs=logprobs, **FLAGS))
    single = finished(house.ask(1, stream=False))
    assert texts(sender) == texts(single) * n
    assert len(sender.responses) > 1 if stream else len(sender.responses) == 1
    so_far = [0] * n
    for response in sender.responses:
        out = response.outputs
        assert out["text_output"].shape == out["finish_reason"].shape == out["logprobs"].shape == (n,)
        assert out["rung_share"].shape == out["cumulative_logprob"].shape == out["num_output_tokens"].shape == (n,)
        assert out["num_output_tokens"].dtype == np.uint32 and out["cumulative_logprob"].dtype == np.float32
        assert (out["num_input_tokens"].shape, out["num_cached_tokens"].tolist()) == ((), [3])
        assert len(out["morph_level"]) == sum(out["num_output_tokens"])
        for at in range(n):
            found = json.loads(out["logprobs"][at])
            assert found is None if logprobs is None else len(found) == out["num_output_tokens"][at]
            so_far[at] += int(out["num_output_tokens"][at])
            if logprobs is not None:
                assert out["cumulative_logprob"][at] == -0.5 * so_far[at]
    assert so_far == [8] * n
    assert set(sender.responses[-1].outputs["finish_reason"]) == {b"length"}


def test_outputs_not_asked_for_are_absent(house: House) -> None:
    (response,) = finished(house.ask(3)).responses
    assert list(response.outputs) == ["text_output"]


def test_the_prompt_stands_before_each_output(house: House) -> None:
    (response,) = finished(house.ask(2, exclude_input_in_output=False)).responses
    assert all(text.startswith(b"hello worldhello") for text in response.outputs["text_output"])


def test_each_output_is_a_request_with_its_own_seed_that_waits_for_the_first(house: House) -> None:
    finished(house.ask(3, seed=40))
    first = house.engine.submitted[0]
    assert [r.sampling.seed for r in house.engine.submitted] == [40, 41, 42]
    assert [r.after for r in house.engine.submitted] == [0, first.key, first.key]
    assert len({r.key for r in house.engine.submitted}) == 3
    assert {r.sampling.n for r in house.engine.submitted} == {1}


def test_seeds_stay_in_range_and_no_seed_stays_none() -> None:
    assert sampling_of(SamplingParams(seed=SEED_RANGE - 1, n=2), 1).seed == 0
    assert sampling_of(SamplingParams(n=2), 1).seed is None


def test_an_output_that_ends_first_keeps_its_reason_while_the_others_go_on(house: House) -> None:
    given = {"seed": SEED_STOP_EARLY - 1, "max_tokens": 30, "return_finish_reason": True}
    sender = finished(house.ask_held(2, stream=True, **given))
    reasons = [tuple(r.outputs["finish_reason"]) for r in sender.responses]
    assert reasons[0] == (b"None", b"None")
    assert (b"None", b"stop") in reasons
    assert reasons[-1] == (b"length", b"stop")
    long, short = texts(sender)
    assert long.startswith(short) and len(short) < len(long)


def test_a_stop_string_ends_one_output_and_the_engines_work_on_it_alone(house: House) -> None:
    house.freeze()
    sender = house.ask(2, stream=True, stop=["world"], max_tokens=50, return_finish_reason=True)
    ours, other = (r.key for r in house.engine.submitted)
    prompt = house.engine.submitted[0].prompt
    say = house.service.on_step
    say(StepOutput([ours, other], [TokenDelta(ours, prompt, []), TokenDelta(other, prompt[:1], [])], [], 0, 2))
    until(lambda: house.engine.cancelled == [ours])
    assert not sender.finals
    # The engine goes on until it is told, and then acknowledges.
    say(StepOutput([], [TokenDelta(ours, prompt, [])], [Finished(ours, "cancelled")], 0, 1))
    say(StepOutput([], [TokenDelta(other, [EOS_ID], [])], [Finished(other, "stop")], 0, 0))
    finished(sender)
    assert texts(sender)[0] == "hello "
    assert sender.responses[-1].outputs["finish_reason"].tolist() == [b"stop", b"stop"]
    assert house.engine.cancelled == [ours]


def test_an_error_of_one_output_ends_the_request_and_the_others(house: House) -> None:
    sender = finished(house.ask(2, seed=SEED_FAIL - 1, max_tokens=400))
    assert (sender.error.code, str(sender.error)) == ("INTERNAL", "it went wrong")
    first, second = (r.key for r in house.engine.submitted)
    until(lambda: house.engine.cancelled == [first] and second not in house.engine._running)
    assert house.service.num_open == 0


def test_a_cancelled_request_cancels_all_its_outputs(house: House) -> None:
    sender = house.ask(3, max_tokens=400)
    sender.cancelled = True
    house.service.poll()
    assert finished(sender).error.code == "CANCELLED"
    assert sorted(house.engine.cancelled) == sorted(r.key for r in house.engine.submitted)


def test_each_output_holds_a_credit_of_its_own(house: House) -> None:
    def begun(*keys: int) -> None:
        house.service.on_step(StepOutput(list(keys), [], [], 1, len(keys), short_of_blocks=True))

    house.freeze()
    begun()  # short of blocks, the line alone counts
    house.ask(1)
    waiting = threading.Thread(target=lambda: house.ask(2), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and len(house.engine.submitted) == 1
    begun(house.engine.submitted[0].key)
    waiting.join(60)
    assert len(house.engine.submitted) == 3
    late = threading.Thread(target=lambda: house.ask(1), daemon=True)
    late.start()
    begun(house.engine.submitted[1].key)  # one of two has begun
    late.join(60)
    assert len(house.engine.submitted) == 4


def test_more_outputs_than_the_line_holds_wait_until_it_is_empty(house: House) -> None:
    house.freeze()
    house.ask(1)
    waiting = threading.Thread(target=lambda: house.ask(4), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    house.service.on_step(StepOutput([house.engine.submitted[0].key], [], [], 0, 1))
    waiting.join(60)
    assert len(house.engine.submitted) == 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n": 5}, "n: must be between 1 and 4, but is 5."),
        ({"n": 2, "temperature": 0}, "n: must be 1 with greedy sampling (temperature 0), but is 2."),
    ],
)
def test_what_n_may_not_be_is_one_sentence(house: House, given: dict[str, Any], said: str) -> None:
    sender = finished(house.ask(**given))
    assert (sender.error.code, str(sender.error)) == ("INVALID_ARG", said)


def test_the_prompts_scores_are_sent_once_though_another_output_has_text_before(house: House) -> None:
    def say(*deltas: TokenDelta, finished: tuple[Finished, ...] = ()) -> None:
        count = len(sender.responses)
        house.service.on_step(StepOutput([], list(deltas), list(finished), 0, 2))
        until(lambda: len(sender.responses) > count)

    house.freeze()
    given = {"prompt_logprobs": 0, "return_prompt_logprobs": True, "stream": True}
    sender = house.ask(2, **given)
    first, second = (r.key for r in house.engine.submitted)
    prompt = house.engine.submitted[0].prompt
    scores = [TokenLogprobs(1, [token], [-1.0]) for token in prompt[1:]]
    say(TokenDelta(second, prompt[:1], [0]))  # it was not behind the first: the prefix cache is off
    say(TokenDelta(first, prompt[:1], [0], prompt_logprobs=scores))
    say(TokenDelta(second, prompt[1:2], [0]))
    say(finished=(Finished(first, "length"), Finished(second, "length")))
    finished(sender)
    early, told, *later = [json.loads(r.outputs["prompt_logprobs"][0]) for r in sender.responses]
    assert (early, later) == (None, [None, None])
    assert told[0] is None and [list(map(int, at)) for at in told[1:]] == [[token] for token in prompt[1:]]


def test_a_prompt_of_one_token_has_no_scores_and_says_so_once(
    house: House, make_sender: Any, make_request: Any
) -> None:
    house.engine.held.set()
    sender = make_sender()
    request = make_request(
        text_input="a",
        stream=True,
        sampling_parameters='{"max_tokens": 4, "n": 2, "prompt_logprobs": 1}',
        return_prompt_logprobs=True,
    )
    house.service.handle(sender, functools.partial(read_request, request))
    house.engine.release_when(lambda: sender.responses)
    assert len(house.engine.submitted[0].prompt) == 1
    told, *later = [json.loads(r.outputs["prompt_logprobs"][0]) for r in finished(sender).responses]
    assert (told, later) == ([None], [None] * len(later)) and later


def test_the_end_of_the_engine_ends_a_request_whose_first_output_is_done(house: House) -> None:
    house.freeze()
    sender = house.ask(2, stream=True)
    first = house.engine.submitted[0].key
    house.service.on_step(StepOutput([first], [TokenDelta(first, [5], [])], [Finished(first, "length")], 0, 1))
    house.service.on_down("it fell over")
    assert finished(sender).error.code == "UNAVAILABLE"


def test_counts_are_of_requests_where_they_say_so(house: House) -> None:
    finished(house.ask(3))
    changes = house.recorder.take()
    assert changes.counts["morph_requests_total", (("outcome", "length"),)] == 1
    assert changes.counts["vllm:prompt_tokens_total", ()] == len(house.engine.submitted[0].prompt)
    assert changes.counts["vllm:generation_tokens_total", ()] == 24
    assert changes.observations["vllm:request_params_n"] == [3]
    assert changes.observations["vllm:request_generation_tokens"] == [8, 8, 8]
    assert len(changes.observations["vllm:time_to_first_token_seconds"]) == 1
