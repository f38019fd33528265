# SPDX-License-Identifier: Apache-2.0
"""Seconds are those of the work, not of asking for it, and nobody waits to learn them."""

from __future__ import annotations

import torch

from kvcomm_vllm.worker.clock import EventClock, HostClock, clock_of


class Stream:
    """A device at work: it has done all that was asked for before ``now``, in milliseconds."""

    def __init__(self) -> None:
        self.asked = self.now = 0.0

    def work(self, ms: float) -> None:
        self.asked += ms


class Event:
    """One that refuses to be waited for."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at = self.stream.asked

    def query(self) -> bool:
        return self.at <= self.stream.now

    def elapsed_time(self, later: Event) -> float:
        assert self.query(), "asked for the time of an event that has not come to pass"
        assert later.query(), "asked for the time of an event that has not come to pass"
        return later.at - self.at

    def synchronize(self) -> None:
        raise AssertionError("waited for the device")


def test_a_devices_phases_are_told_by_a_later_step_with_the_time_they_took_there() -> None:
    stream = Stream()
    clock = EventClock(lambda: Event(stream))
    for phase, ms in (("load", 3.0), ("side_forward", 20.0)):
        began = clock.begin()
        stream.work(ms)
        clock.end(phase, began)
    assert clock.read() == []
    stream.now = 10.0
    assert clock.read() == [("load", 0.003)]
    stream.now = 23.0
    assert clock.read() == [("side_forward", 0.020)]
    assert clock.read() == []


def test_on_the_cpu_a_phase_is_told_at_once_and_once() -> None:
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    clock.end("load", clock.begin())
    ((phase, seconds),) = clock.read()
    assert phase == "load"
    assert seconds >= 0
    assert clock.read() == []


def test_a_device_has_a_clock_of_events() -> None:
    assert isinstance(clock_of(torch.device("cuda")), EventClock)
