"""Fences: has the device done what it had been given?

The step loop enqueues work and goes on. Memory that queued work reads or writes may be taken away
only once that work is over; a fence tells, without waiting. On CPU everything is done when the call
that does it returns, so its fences are done from the start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod


class Fence(ABC):
    """A point in the order of the device's work."""

    @abstractmethod
    def done(self) -> bool:
        """Whether everything before it is over. Never waits; once true, always true."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until it is (start-up, scripted schedules, tests)."""


class DoneFence(Fence):
    """Nothing is queued."""

    def done(self) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Returns at once."""


class DeviceOrder(ABC):
    """The order in which a device runs the steps of the engine."""

    @property
    @abstractmethod
    def queues(self) -> bool:
        """Whether steps are put into a queue, so that what is enqueued later finds them done."""

    @abstractmethod
    def fence(self) -> Fence:
        """Behind all that has been enqueued for steps so far."""


class CpuOrder(DeviceOrder):
    """A CPU's work is over when the call returns."""

    @property
    def queues(self) -> bool:
        """It has none."""
        return False

    def fence(self) -> Fence:
        """Done from the start."""
        return DoneFence()
