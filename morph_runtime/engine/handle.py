"""Who takes part in keeping an engine running: one engine process, who listens, and the settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from morph_runtime.engine.client import EngineListener
from morph_runtime.engine.messages import EngineInfo, QueueSignal, Submit


class ServingEngine(Protocol):
    """What serving takes: `EngineKeeper`, or a link to the process that has it."""

    def submit(self, request: Submit) -> None: ...
    def cancel(self, key: int) -> None: ...
    def publish_queue(self, signal: QueueSignal) -> None: ...
    def set_mode(self, mode: str = "", cap: float | None = None) -> None: ...
    def close(self, drain_s: float = 0.0) -> None: ...


class EngineHandle(ServingEngine, Protocol):
    """One engine process: `EngineClient`, or a stand-in for tests."""

    @property
    def ended_from_outside(self) -> bool: ...
    def start(self, timeout_s: float = 120.0) -> EngineInfo: ...
    def kill(self) -> None: ...


class KeeperListener(EngineListener, Protocol):
    """Who wants to hear from the engine, whichever process it is just now. One call at a time; `on_down` is the last
    word: no engine will come any more."""

    def on_restarting(self, reason: str) -> None:
        """The engine has ended and is started anew; requests may come, and wait."""

    def on_restarted(self) -> None:
        """The new engine is ready and has the requests."""


@dataclass(frozen=True)
class KeeperSettings:
    """When an engine is started anew.

    Attributes:
        restarts: starts in a row that may fail of themselves before it is given up (`Patience`); 0: none is made.
        pause_s: seconds before the second start in a row; doubles with each further one, up to 30 s.
        silence_s: seconds without a message after which an engine that has requests is ended; 0: never.
        start_timeout_s: seconds that a start may take.
    """

    restarts: int = 5
    pause_s: float = 0.5
    silence_s: float = 60.0
    start_timeout_s: float = 600.0
