"""The serving side's centre: open requests, from admission to FINAL, and what the engine says about them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from morph_backend.accounting import RequestAccounting
from morph_backend.admission import Admission, Admitted, Admitting
from morph_backend.channel import ResponseChannel, Status
from morph_backend.engine_metrics import EngineMetrics
from morph_backend.fan_out import submissions
from morph_backend.inputs import GenerateRequest
from morph_backend.open_request import End, OpenRequest, OpenRequests, Output, Tokens
from morph_backend.outputs import sentence
from morph_backend.recorder import MetricsRecorder
from morph_backend.responder import UNHEALTHY, Responder
from morph_backend.run_control import MODE, RunControl, check_key
from morph_backend.rungs import RungShares
from morph_backend.send_watch import SendTimes
from morph_backend.senders import SenderPool
from morph_backend.vocabulary import check_prompt, spell_bad_words
from morph_runtime.credits import CreditLimits, EngineNews
from morph_runtime.engine.handle import ServingEngine
from morph_runtime.engine.messages import Decision, EngineInfo, EngineStats, QueueSignal, StepOutput, TokenDelta
from morph_runtime.errors import EngineDown, RequestError
from morph_runtime.slo import SloClass, check_class
from morph_runtime.text.assembler import OutputAssembler
from morph_runtime.text.parameters import ParameterLimits
from morph_runtime.text.tokenizer import Tokenizer, check_context

SHUTTING_DOWN = "The server is shutting down."
THREADS = ("branch", "execute", "engine-reader", "housekeeper", "metrics", "queue-nudger", "queue-watch", "send-watch")
"""Threads whose defects are counted, from 0 on; those that send join them with their first."""


class Service:
    """Serves requests. `handle` is called by Triton's thread, `on_*` by the engine client's reader thread,
    `poll` by the housekeeper; sender threads belong to it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        recorder: MetricsRecorder,
        *,
        line: int,
        sender_threads: int = 2,
        max_request_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
        on_decisions: Callable[[Sequence[Decision]], None] = lambda _decisions: None,
        on_gone: Callable[[str], None] = lambda _reason: None,
        classes: Sequence[SloClass] = (),
        admin_key: str = "",
        admission: Admitting | None = None,
        engine_metrics: EngineMetrics | None = None,
        first_key: int = 1,
    ) -> None:
        """`on_decisions` is told of the controller's decisions; `on_gone` why nothing can be served any more;
        `classes` are those that requests may name; `admin_key` is what requests that change the controller must have.
        `admission` gives out credits, None: for `line` requests; `engine_metrics` hears of the engine, None: on
        `recorder`; outputs are numbered from `first_key` on.
        """
        self._tokenizer = tokenizer
        self._recorder = recorder
        self._clock = clock
        self._max_request_s = max_request_s
        self._sender_threads = sender_threads
        self._on_decisions, self._on_gone = on_decisions, on_gone
        self._classes, self._admin_key = classes, admin_key
        self._line = line
        self._admission: Admitting = admission or Admission(CreditLimits(line))
        self._engine_metrics = engine_metrics or EngineMetrics(recorder)
        self._lock = threading.Lock()
        self._open = OpenRequests(first_key)
        self.sends = SendTimes()
        self._refusal = ""  # why no request is taken any more; guarded by _lock
        self._engine: ServingEngine | None = None
        self._up = False
        self._over = False  # `on_down` has been called; the engine may still run
        self._info: EngineInfo | None = None
        for thread in THREADS:
            recorder.declare("morph_backend_errors_total", thread=thread)
        self._level = 0

    # -- life ----------------------------------------------------------------------------------------------------

    def attach(self, engine: ServingEngine, info: EngineInfo) -> None:
        """Connect the started engine; before it no request may be handled."""
        self._engine, self._info, self._up = engine, info, True
        self._admission.set_limits(CreditLimits(self._line, info.max_num_batched_tokens, info.max_num_seqs))
        shares = RungShares(info.num_layers, info.ladder)
        self._accounting = RequestAccounting(self._recorder)
        self._responder = Responder(self, shares, self._accounting.generated, self._tokenizer.spelling)
        self._senders = SenderPool(self._sender_threads, self._responder.respond, self._fail_request, self.on_defect)
        self._engine_metrics.start(info)

    @property
    def healthy(self) -> bool:
        """Whether the engine is up and requests are taken."""
        return self._up and not self._refusal

    @property
    def held(self) -> int:
        """Requests held in `execute()`, waiting for a credit."""
        return self._admission.waiting

    def publish_queue(self, signal: QueueSignal) -> None:
        """Pass the outer queue's state on to the metrics, and to the engine's controller if the engine is there."""
        self._engine_metrics.outer(signal.pending)
        if self._engine is not None and self.healthy:
            try:
                self._engine.publish_queue(signal)
            except EngineDown as error:
                logging.getLogger(__name__).debug("nobody to tell of the queue: %s", error)

    @property
    def num_open(self) -> int:
        """Requests without a FINAL."""
        return len(self._open)

    @property
    def limits(self) -> ParameterLimits:
        """What one request may ask for."""
        assert self._info is not None
        return ParameterLimits(
            max_tokens=self._info.max_model_len,
            max_outputs=self._info.max_num_seqs,
            vocab_size=self._info.vocab_size,
        )

    def refuse(self, reason: str) -> None:
        """Take no more requests; those that wait for a credit are answered at once, the others go on."""
        with self._lock:
            self._refusal = self._refusal or reason
        self._admission.close()

    def abort(self, detail: str) -> None:
        """End every open request with an UNAVAILABLE error."""
        for request in self._open.all():
            if request.channel.fail(Status.UNAVAILABLE, detail):
                self.closed(request, "error")

    def close(self) -> None:
        """End the engine and the sender threads; open requests get an error."""
        self.refuse(SHUTTING_DOWN)
        self.abort(SHUTTING_DOWN)
        if self._engine is not None:
            self._engine.close()
            self._senders.close()

    # -- a request's way in --------------------------------------------------------------------------------------

    def handle(self, sender: Any, read: Callable[[ParameterLimits], GenerateRequest]) -> None:
        """Serve one request: check it, wait for a credit, hand it to the engine. Blocks while it waits.

        Args:
            sender: Triton's response sender.
            read: reads the request; raises RequestError.
        """
        channel = ResponseChannel(sender, self.sends)
        try:
            self._handle(channel, read)
        except RequestError as error:
            if channel.fail(Status.INVALID_ARG, str(error)):
                self._accounting.outcome("rejected")
        except Exception as error:
            logging.getLogger(__name__).exception("a request could not be handled")
            self.on_defect("execute")
            if channel.fail(Status.INTERNAL, f"The request could not be handled: {error}"):
                self._accounting.outcome("error")

    def _handle(self, channel: ResponseChannel, read: Callable[[ParameterLimits], GenerateRequest]) -> None:
        assert self._info is not None and self._engine is not None
        arrival_s = self._clock()
        given = read(self.limits)
        check_class(self._classes, given.slo_class)
        if given.control is not None:
            self._control(channel, given.control)
            return
        prompt = self._tokenizer.encode_prompt(given.text, self._info.max_model_len - 1)
        check_prompt(prompt, self._info.vocab_size)
        given = given.within_context(len(prompt), self._info.max_model_len)
        check_context(len(prompt), given.sampling.max_tokens, self._info.max_model_len)
        outputs = [
            Output(key, OutputAssembler(self._tokenizer, given.sampling, self._info.eos_token_ids, prompt))
            for key in self._open.new_keys(given.sampling.n)
        ]
        request = OpenRequest(given, prompt, channel, outputs, arrival_s)
        with self._lock:
            refusal = self._refusal
            if not refusal:
                self._open.add(request)
        if refusal:
            self._reject(request)
            return
        try:
            self._admit(request)
        except Exception:
            self._release(request)
            self._open.remove(request)
            raise

    def _control(self, channel: ResponseChannel, control: RunControl) -> None:
        """Do what the administrator asks for."""
        assert self._engine is not None and self._info is not None
        check_key(control.key, self._admin_key)
        if self._info.pin:
            raise RequestError(MODE, f"has no effect: MORPH_PIN={self._info.pin} keeps the server at one level.")
        self._engine.set_mode(control.mode, control.cap)
        logging.getLogger(__name__).warning("the administrator has set: %s", control)
        channel.send([sentence(str(control))], final=True)

    def _admit(self, request: OpenRequest) -> None:
        assert self._engine is not None and self._info is not None
        keys = [output.key for output in request.outputs]
        admitted = self._admission.acquire(keys, len(request.prompt), lambda: request.channel.closed)
        if admitted is Admitted.GAVE_UP:
            return
        if admitted is Admitted.CLOSED:
            self._reject(request)
            return
        try:
            sampling = spell_bad_words(request.given.sampling, self._tokenizer, self._info.vocab_size)
            for message in submissions(request, sampling):
                self._engine.submit(message)
            request.submitted = True  # who closes it from now on cancels it; before, the engine might not know it
            if request.channel.closed:
                self._cancel(request)
        except EngineDown as error:
            self._release(request)
            self._responder.fail(request, End("down", str(error)))

    def _reject(self, request: OpenRequest) -> None:
        # Where another process gives out the credits, it may refuse before this one has heard why.
        if request.channel.fail(Status.UNAVAILABLE, self._refusal or SHUTTING_DOWN):
            self.closed(request, "rejected")

    # -- the engine's words --------------------------------------------------------------------------------------

    def on_step(self, out: StepOutput) -> None:
        """Tokens, starts and ends of one step. A request whose part of it cannot be handled ends; the others go on."""
        now = self._clock()
        over = (*out.started, *(finished.key for finished in out.finished))
        if out.from_engine and not self._over:
            self._engine_metrics.beat()
            self._engine_metrics.requests(out.waiting, out.running)
            self._admission.stepped(over, EngineNews(out.running, out.short_of_blocks))
        else:  # who may enter is as it was
            self._admission.release(over)
        for key, cached in zip_longest(out.started, out.started_cached, fillvalue=0):
            if (begun := self._open.find(key)) is not None and begun[1] == 0:
                begun[0].cached_tokens = cached
                self._accounting.started(begun[0])
        news: dict[int, tuple[OpenRequest, list[Tokens | End]]] = {}
        pace_s: list[float] = []
        for delta in out.tokens:
            if (found := self._open.find(delta.key)) is None or not delta.tokens:
                continue
            request, at = found
            try:
                new = self._arrived(request, at, delta, now, pace_s)
            except Exception as error:
                logging.getLogger(__name__).exception("tokens could not be handled")
                self.on_defect("engine-reader")
                self._fail_request(request, error)
            else:
                news.setdefault(request.key, (request, []))[1].append(new)
        self._accounting.paced(pace_s)
        for finished in out.finished:
            if (found := self._open.find(finished.key)) is not None:
                events = news.setdefault(found[0].key, (found[0], []))[1]
                events.append(End(finished.reason, finished.detail, found[1]))
        for request, events in news.values():
            # At once: a sender thread must never see a request's last text without its end, for FINAL rides on it.
            request.inbox.extend(events)
            self._senders.wake(request)

    def _arrived(self, request: OpenRequest, at: int, delta: TokenDelta, now: float, pace_s: list[float]) -> Tokens:
        """Book new tokens of a request's output number `at`; their seconds per token are added to `pace_s`."""
        request.prompt_logprobs = delta.prompt_logprobs or request.prompt_logprobs
        missing = len(delta.tokens) - len(delta.levels)
        levels = delta.levels + [self._level] * missing if missing > 0 else delta.levels[: len(delta.tokens)]
        request.outputs[at].arrived += len(delta.tokens)
        pace_s += self._accounting.arrived(request, request.outputs[at], len(delta.tokens), now)
        return Tokens(delta.tokens, levels, delta.logprobs, at, delta.history)

    def on_stats(self, stats: EngineStats) -> None:
        """A snapshot."""
        self._level = stats.level
        try:
            self._on_decisions(stats.decisions)
            if not self._over:  # it would look alive
                self._engine_metrics.stats(stats)
        except Exception:
            logging.getLogger(__name__).exception("a snapshot could not be handled")
            self.on_defect("engine-reader")

    def on_restarting(self, reason: str) -> None:
        """The engine has ended and another one is started; requests wait for it, the open ones will go on."""
        self._up = False
        # Nobody but the line until the new engine has run a step: who comes meanwhile can time out in Triton's queue.
        self._admission.stepped((), EngineNews(short_of_blocks=True))
        self._engine_metrics.up(False)
        for request in self._open.all():
            if arrived := sum(output.arrived for output in request.outputs):
                request.recomputed_at.append(arrived)

    def on_restarted(self) -> None:
        """The new engine has the open requests."""
        if not self._over:
            self._up = True
            self._engine_metrics.restarted()

    def on_down(self, reason: str) -> None:
        """Nothing can be served any more: every open request ends with an error, and so does every later one."""
        logging.getLogger(__name__).error("nothing can be served any more: %s", reason)
        self._up, self._over = False, True
        self._engine_metrics.up(False)
        self.refuse(f"{UNHEALTHY}: {reason}")
        for request in self._open.all():
            request.inbox.append(End("down", reason))
            self._senders.wake(request)
        self._on_gone(reason)

    # -- duties and endings --------------------------------------------------------------------------------------

    def poll(self) -> None:
        """End requests whose client has gone or whose time is over; the log lines are Triton's vLLM backend's."""
        now = self._clock()
        if self._engine is not None and not self._up and not self._refusal:
            self._engine_metrics.beat()  # for the engine that is being restarted: this process is alive
        for request in self._open.all():
            try:
                self._look_at(request, now)
            except Exception as error:  # or nobody behind it would be looked at
                logging.getLogger(__name__).exception("a request could not be looked at")
                self.on_defect("housekeeper")
                self._fail_request(request, error)

    def _look_at(self, request: OpenRequest, now: float) -> None:
        logger = logging.getLogger(__name__)
        if request.channel.is_cancelled():
            logger.info("[vllm] Cancelling the request")
            status, message, outcome = Status.CANCELLED, "Request was cancelled", "cancelled"
        elif now - request.arrival_s > self._max_request_s:
            status, outcome = Status.UNAVAILABLE, "error"
            message = f"The request took longer than max_request_seconds, {self._max_request_s:g} s."
        else:
            return
        if request.channel.fail(status, message):
            self.closed(request, outcome)
            self._admission.wake()
            if status is Status.CANCELLED:
                logger.info("[vllm] Successfully cancelled the request")

    def closed(self, request: OpenRequest, outcome: str) -> None:
        """A request's FINAL is out: forget it, count it, and stop the engine's work on it."""
        if not request.close():
            return
        self._open.remove(request)
        self._accounting.ended(request, outcome, self._clock())
        if request.submitted:
            self._cancel(request)

    def stop(self, output: Output) -> None:
        """A stop string has ended an output: the engine need not go on with it."""
        output.ended = True
        if self._engine is not None:
            try:
                self._engine.cancel(output.key)
            except EngineDown as error:
                logging.getLogger(__name__).info("nothing to cancel: %s", error)

    def _cancel(self, request: OpenRequest) -> None:
        """Stop the engine's work on what has not ended of a request."""
        for output in request.outputs:
            if not output.ended:
                self.stop(output)

    def _release(self, request: OpenRequest) -> None:
        """Give back all credits of a request."""
        self._admission.release([output.key for output in request.outputs])

    def on_defect(self, thread: str) -> None:
        """An exception that nobody had foreseen was caught (and logged) in a thread."""
        self._recorder.count("morph_backend_errors_total", thread=thread)

    def _fail_request(self, request: OpenRequest, error: Exception) -> None:
        if request.channel.fail(Status.INTERNAL, f"The response could not be sent: {error}"):
            self.closed(request, "error")
