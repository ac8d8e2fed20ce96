"""What the serving processes of one model say to each other.

One process's interpreter handles some 3,000 responses a second on a server's processor, and the tokens of all streams
wait for its lock. So a model may have several: each reads requests, turns tokens into text and sends responses by
itself. The one that owns the engine keeps the engine alive, gives out the credits for all and reports the metrics; a
*branch* sends it what is meant for the engine, and hears what the engine says of its requests.
"""

from __future__ import annotations

import msgspec

from morph_runtime.engine.messages import Cancel, EngineInfo, SetMode, StepOutput, Submit

KEY_BITS = 40
"""A process numbers its outputs from `index << KEY_BITS` on, so that a key says whose it is."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A branch is there; its first word."""

    index: int


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """A credit is wanted for each of these outputs of one request; one question at a time."""

    keys: list[int]
    prompt_tokens: int


class GiveUp(msgspec.Struct, frozen=True, tag="give-up"):
    """The question that is open has lost its sense; it is answered all the same."""


class Release(msgspec.Struct, frozen=True, tag="release"):
    """The credits of these outputs are given back."""

    keys: list[int]


class Counted(msgspec.Struct, frozen=True, tag="counted"):
    """What has been counted and observed since the last of these: (metric, labels, number), and values by metric."""

    counts: list[tuple[str, tuple[tuple[str, str], ...], float]]
    observations: dict[str, list[float]]


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """No request is open, and none is taken any more."""


class Gone(msgspec.Struct, frozen=True, tag="gone"):
    """Nothing can be served any more, for this reason."""

    reason: str


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    """The one who says it ends as it should; its last word."""


ToOwner = Hello | Ask | GiveUp | Release | Counted | Drained | Gone | Bye | Submit | Cancel | SetMode


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The engine is there. The owner's first word, or `Refused`."""

    info: EngineInfo


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """There will be no engine; `user_error`: for a reason that the operator can mend."""

    message: str
    user_error: bool


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """To `Ask`: a value of `admission.Admitted`."""

    admitted: str


class Restarting(msgspec.Struct, frozen=True, tag="restarting"):
    """The engine has ended and another one is started."""

    reason: str


class Restarted(msgspec.Struct, frozen=True, tag="restarted"):
    """The new engine has the requests."""


class Down(msgspec.Struct, frozen=True, tag="down"):
    """Nothing can be served any more."""

    reason: str


ToBranch = Welcome | Refused | Answer | StepOutput | Restarting | Restarted | Down | Bye
