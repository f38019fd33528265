# SPDX-License-Identifier: Apache-2.0
"""An engine that can be woken sleeps until it is time to learn, and then learns."""

from __future__ import annotations

import threading
from collections.abc import Callable

from engine_without_worker import EngineWithoutWorker
from test_learning import ANCHOR, hear

from kvcomm_vllm.scheduler.idle.alarm import Alarm

Make = Callable[..., EngineWithoutWorker]
LONG = 3600.0


def test_an_alarm_rings_once_at_the_last_moment_it_was_set_to() -> None:
    rung = threading.Semaphore(0)
    alarm = Alarm(rung.release)
    alarm.set(LONG)
    alarm.set(0.0)
    assert rung.acquire(timeout=60)
    alarm.set(LONG)
    alarm.stop()
    assert not rung.acquire(blocking=False)


def test_an_engine_sleeps_while_a_lesson_waits_and_is_woken_for_it(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR | {"audit_idle_seconds": 0.2})
    lessons = engine.half.lessons
    rung = threading.Semaphore(0)
    lessons.alarm = Alarm(rung.release)
    hear(engine, 0)
    hear(engine, 1)
    assert lessons.pending
    while engine.scheduler.has_requests() and not rung.acquire(blocking=False):
        engine.step()
    rung.acquire(timeout=60)
    assert lessons.due(), "it is time"
    assert engine.scheduler.has_requests()
    engine.idle()
    assert not lessons.pending


def test_a_request_puts_the_moment_off(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR | {"audit_idle_seconds": LONG})
    lessons = engine.half.lessons
    lessons.alarm = Alarm(lambda: None)
    hear(engine, 0)
    hear(engine, 1)
    engine.idle()
    assert lessons.pending
    assert not engine.scheduler.has_requests(), "the engine sleeps"
    hear(engine, 2)
    assert lessons.due(), "until it has been seen idle, it goes on"
    engine.idle()
    assert not lessons.due()
    lessons.alarm.stop()


def test_an_engine_that_rests_between_two_pieces_is_woken_for_the_next(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR | {"audit_share": 0.001}, audit_tokens=8)
    lessons = engine.half.lessons
    hear(engine, 0)
    hear(engine, 1)
    rung = threading.Semaphore(0)
    lessons.alarm = Alarm(rung.release)
    while not engine.lessons:
        engine.step()
    while engine.scheduler.has_requests():
        engine.step()
    assert lessons.pending, "the engine sleeps before the next piece"
    assert rung.acquire(timeout=60)
    lessons.alarm.stop()
