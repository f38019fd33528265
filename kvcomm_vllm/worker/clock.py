# SPDX-License-Identifier: Apache-2.0
"""Clocks that say how long the phases of a step took, where they are carried out.

A device works behind the host: what the host measures there is how long it takes to ask for the
work. So events are put between the phases, and read once they have come to pass.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Measures phases one after another."""

    def begin(self) -> Any:
        """What :meth:`end` is given."""

    def end(self, phase: str, began: Any) -> None:
        """The phase is over, or asked for."""

    def read(self) -> list[tuple[str, float]]:
        """Phases that are over, each told once, and their seconds."""


class HostClock:
    """Of work that is done when the call returns."""

    def __init__(self) -> None:
        self._over: list[tuple[str, float]] = []

    def begin(self) -> float:
        return time.perf_counter()

    def end(self, phase: str, began: float) -> None:
        self._over.append((phase, time.perf_counter() - began))

    def read(self) -> list[tuple[str, float]]:
        over, self._over = self._over, []
        return over


class EventClock:
    """Of a device's work, told by later steps: nobody waits for it.

    Args:
        make_event: a timing event of the device.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        self.make_event = make_event
        self._asked_for: deque[tuple[str, Any, Any]] = deque()

    def begin(self) -> Any:
        event = self.make_event()
        event.record()
        return event

    def end(self, phase: str, began: Any) -> None:
        self._asked_for.append((phase, began, self.begin()))

    def read(self) -> list[tuple[str, float]]:
        over = []
        # one stream: what is not over yet is before all that was asked for later
        while self._asked_for and self._asked_for[0][2].query():
            phase, began, ended = self._asked_for.popleft()
            over.append((phase, began.elapsed_time(ended) / 1e3))
        return over


def clock_of(device: torch.device) -> Clock:
    """The clock that tells the time of this device's work."""
    if device.type == "cpu":
        return HostClock()
    return EventClock(lambda: torch.Event(device.type, enable_timing=True))
