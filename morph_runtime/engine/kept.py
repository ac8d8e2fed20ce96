"""What must outlive the engine process: its requests with the tokens that have come, and who may have ended it.

Requests that were in the engine when it ended by its own fault are *suspects*. The next engine gets them one at a
time. A suspect that goes on past the place of the crash is cleared; one that ends the engine while it is alone in
it is not tried again. An end from outside (somebody's SIGKILL) makes no suspects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from morph_runtime.engine.messages import Cancel, Finished, StepOutput, Submit

TRIAL_TOKENS = 4
"""New tokens that clear a suspect: with overlap, two steps beyond the last token that is known may have begun."""
POISON = "The request has ended the engine process twice, the second time alone in it, and is not tried again."


class Place(Enum):
    """Where a request stands: not in the engine, in it, or in it with a cancellation on its way."""

    OUTSIDE = "outside"
    INSIDE = "inside"
    LEAVING = "leaving"


@dataclass(eq=False)
class Kept:
    """One request.

    Attributes:
        submit: as the serving process has handed it in.
        tokens: of its output so far.
        place: where it stands.
        started: whether the serving process was told that it has been scheduled.
        dropped: whether the serving process has cancelled it.
        suspect: whether it may have ended the engine.
        cleared_at: number of output tokens that clear it.
    """

    submit: Submit
    tokens: list[int] = field(default_factory=list)
    place: Place = Place.OUTSIDE
    started: bool = False
    dropped: bool = False
    suspect: bool = False
    cleared_at: int = 0

    def message(self) -> Submit:
        """What a new engine is told: go on after the tokens that have come. A prompt is scored once."""
        if not self.tokens:
            return self.submit
        sampling = msgspec.structs.replace(self.submit.sampling, prompt_logprobs=None)
        return msgspec.structs.replace(self.submit, sampling=sampling, resumed=list(self.tokens))


class KeptRequests:
    """Decides which requests are in the engine. Not safe for use from several threads.

    `send` takes what the engine is to be told, in this order.
    """

    def __init__(self, send: Callable[[Submit | Cancel], None]) -> None:
        self._send = send
        self._by_key: dict[int, Kept] = {}
        self._trying = False  # there may be suspects

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def num_inside(self) -> int:
        """Requests that the engine works on."""
        return sum(kept.place is not Place.OUTSIDE for kept in self._by_key.values())

    @property
    def num_suspects(self) -> int:
        """Requests that may have ended the engine."""
        return sum(kept.suspect for kept in self._by_key.values())

    @property
    def on_trial(self) -> bool:
        """Whether a suspect is alone in the engine: if that ends by its own fault now, the suspect is to blame."""
        inside = self._inside()
        return len(inside) == 1 and inside[0].suspect

    def add(self, submit: Submit) -> None:
        """Keep a new request; `admit` hands it on."""
        self._by_key[submit.key] = Kept(submit)

    def admit(self) -> None:
        """Hand on what may enter: all, or while there are suspects one of them at a time."""
        suspects = [kept for kept in self._by_key.values() if kept.suspect]
        if suspects:
            if not self.num_inside:
                self._enter(suspects[0])
            return
        for kept in self._by_key.values():
            if kept.place is Place.OUTSIDE:
                self._enter(kept)

    def cancel(self, key: int) -> Finished | None:
        """The serving process needs a request no more; its end, if the engine has none to tell."""
        kept = self._by_key.get(key)
        if kept is None:
            return None
        kept.dropped = True
        if kept.place is Place.OUTSIDE:
            return self._drop(kept, "cancelled")
        if kept.place is Place.INSIDE:
            kept.place = Place.LEAVING
            self._send(Cancel(key=key))
        return None

    def fail(self, key: int, detail: str) -> list[Finished]:
        """End a request that cannot be handed to any engine."""
        kept = self._by_key.get(key)
        return [] if kept is None else [self._drop(kept, "error", detail)]

    def step(self, out: StepOutput) -> StepOutput:
        """Take what an engine's step has produced; returns what the serving process is to be told of it.

        While suspects are tried it is told that the engine is short of blocks: whom it lets in has to wait here.
        """
        started, cached = self._new_starts(out)
        changed = len(started) != len(out.started)
        for delta in out.tokens:
            if (kept := self._by_key.get(delta.key)) is not None:
                kept.tokens += delta.tokens
                if kept.suspect and len(kept.tokens) >= kept.cleared_at:
                    self._clear(kept)
        finished = [end for end in out.finished if self._has_ended(end)]
        changed = changed or len(finished) != len(out.finished)
        if out.finished and self._by_key:
            self.admit()
        if self._trying:
            self._trying = self.num_suspects > 0
        if not changed and not self._trying:
            return out
        short = out.short_of_blocks or self._trying
        return msgspec.structs.replace(
            out, started=started, started_cached=cached, finished=finished, short_of_blocks=short
        )

    def crashed(self, own_fault: bool) -> list[Finished]:
        """The engine has ended, by its own fault or from outside; returns the ends of those who do not go on."""
        convicting = own_fault and self.on_trial
        self._trying = self._trying or own_fault
        ended = []
        for kept in self._inside():
            if kept.dropped:
                ended.append(self._drop(kept, "cancelled"))
            elif convicting:
                ended.append(self._drop(kept, "error", POISON))
            elif own_fault:
                kept.suspect = True
            kept.place = Place.OUTSIDE
            kept.cleared_at = len(kept.tokens) + TRIAL_TOKENS
        return ended

    def clear(self) -> None:
        """Forget everything."""
        self._by_key.clear()

    def _inside(self) -> list[Kept]:
        return [kept for kept in self._by_key.values() if kept.place is not Place.OUTSIDE]

    def _enter(self, kept: Kept) -> None:
        kept.place = Place.INSIDE
        self._send(kept.message())

    def _drop(self, kept: Kept, reason: str, detail: str = "") -> Finished:
        del self._by_key[kept.submit.key]
        return Finished(kept.submit.key, reason, detail)

    def _new_starts(self, out: StepOutput) -> tuple[list[int], list[int]]:
        """`started` and `started_cached` without those that have been told before."""
        started, cached = [], []
        for at, key in enumerate(out.started):
            kept = self._by_key.get(key)
            if kept is None or not kept.started:
                started.append(key)
                cached += out.started_cached[at : at + 1]
            if kept is not None:
                kept.started = True
        return started, cached

    def _clear(self, kept: Kept) -> None:
        """A suspect has gone on: out with it if others are to be tried, alone like itself."""
        kept.suspect = False
        if not self.num_suspects:
            self.admit()
        elif kept.place is Place.INSIDE:
            kept.place = Place.LEAVING
            self._send(Cancel(key=kept.submit.key))

    def _has_ended(self, end: Finished) -> bool:
        """Whether an end is one to tell: not if we took the request out only to put it in again later."""
        kept = self._by_key.get(end.key)
        if kept is None:
            return True
        if end.reason == "cancelled" and not kept.dropped:
            kept.place = Place.OUTSIDE
            return False
        del self._by_key[end.key]
        return True
