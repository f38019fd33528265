# SPDX-License-Identifier: Apache-2.0
"""An operator never waits for lessons: nothing is learned while the engine is to rest."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words
from test_learning import ANCHOR, hear
from vllm.v1.core.sched.interface import PauseState

from kvcomm_vllm.scheduler.idle.alarm import Alarm

Make = Callable[..., EngineWithoutWorker]
Pause = Callable[[EngineWithoutWorker, bool], None]

LONG = 3600.0


def pausing(state: PauseState) -> Pause:
    def set_state(engine: EngineWithoutWorker, on: bool) -> None:
        engine.scheduler.set_pause_state(state if on else PauseState.UNPAUSED)

    return set_state


def engine_says(**core: Any) -> Pause:
    def set_state(engine: EngineWithoutWorker, on: bool) -> None:
        engine.half.engine.engine = SimpleNamespace(**core) if on else None

    return set_state


RESTS: list[Any] = [
    pytest.param(pausing(PauseState.PAUSED_NEW), id="pause, abort or wait"),
    pytest.param(pausing(PauseState.PAUSED_ALL), id="pause, keep"),
    pytest.param(engine_says(model_executor=SimpleNamespace(is_sleeping=True)), id="sleep"),
    pytest.param(engine_says(is_running=lambda: False), id="shutdown"),
]
each_rest = pytest.mark.parametrize("rest", RESTS)
pipelines = pytest.mark.parametrize("pipeline", [1, 2])


def with_lessons(make_engine: Make, **settings: Any) -> EngineWithoutWorker:
    """An engine in which three lessons of many pieces wait."""
    engine = make_engine(**ANCHOR | {"num_blocks": 256, "audit_tokens": 8} | settings)
    for number in range(4):
        hear(engine, number)
    assert len(engine.half.lessons._waiting) == 3
    return engine


def in_a_lesson(make_engine: Make, **settings: Any) -> EngineWithoutWorker:
    """An engine with a lesson under way."""
    engine = with_lessons(make_engine, **settings)
    while not engine.lessons:
        engine.step()
    return engine


def test_the_connector_looks_at_the_scheduler_that_made_it(make_engine: Make) -> None:
    engine = make_engine()
    assert engine.half.engine.scheduler is engine.scheduler


@each_rest
@pipelines
def test_a_resting_engine_has_nothing_to_do_though_lessons_wait(
    make_engine: Make, rest: Pause, pipeline: int
) -> None:
    engine = with_lessons(make_engine, pipeline=pipeline)
    engine.step()  # tells the workers which requests have ended, as after any request
    assert engine.scheduler.has_requests()
    rest(engine, True)
    assert not engine.scheduler.has_requests()
    assert engine.half.lessons.pending


@each_rest
@pipelines
def test_nothing_is_learned_by_a_resting_engine_and_all_of_it_afterwards(
    make_engine: Make, rest: Pause, pipeline: int
) -> None:
    engine = in_a_lesson(make_engine, pipeline=pipeline)
    rest(engine, True)
    pieces = len(engine.lessons)
    for _ in range(5):  # also if vLLM steps for a reason of its own
        engine.step()
    engine.drain()
    assert len(engine.lessons) == pieces
    assert len(engine.half.lessons._waiting) == 3, "the lesson under way waits again"
    rest(engine, False)
    assert engine.scheduler.has_requests(), "vLLM's loop goes on"
    engine.idle()
    assert not engine.half.lessons.pending
    assert len([op for op in engine.lessons if op.spans]) == 3
    check_idle(engine)


def test_a_piece_under_way_that_is_the_last_one_still_counts(make_engine: Make) -> None:
    engine = with_lessons(make_engine, pipeline=2)
    while not (engine.lessons and engine.lessons[-1].spans):
        engine.step()
    assert engine.half.lessons._in_flight
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert not engine.scheduler.has_requests()
    engine.drain()
    assert engine.half.modes["anchor"].table.counts() == (1, 1)
    assert len(engine.half.lessons._waiting) == 2


def test_a_lesson_that_a_pause_has_interrupted_begins_anew(make_engine: Make) -> None:
    """What stood in its free pages may be gone, or of other weights."""
    engine = in_a_lesson(make_engine)
    begun = engine.lessons[0]
    assert begun.hole is not None
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert not engine.scheduler.has_requests()
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.step()
    again = engine.lessons[1]
    assert (again.number, again.hole) == (begun.number, begun.hole)


@pipelines
def test_requests_that_drain_in_a_pause_end_and_teach_later(
    make_engine: Make, pipeline: int
) -> None:
    engine = in_a_lesson(make_engine, pipeline=pipeline)
    engine.add("running", words("user", 30), words("answer", 6))
    engine.step()
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.run("running")
    pieces = len(engine.lessons)
    while engine.scheduler.has_requests():
        engine.step()
    engine.drain()
    assert len(engine.lessons) == pieces
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.idle()
    assert not engine.half.lessons.pending
    check_idle(engine)


def test_requests_that_wait_for_the_end_of_a_pause_go_before_lessons(make_engine: Make) -> None:
    engine = in_a_lesson(make_engine)
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.add("waiting", words("user", 30))
    assert not engine.scheduler.has_requests()
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    pieces = len(engine.lessons)
    engine.run("waiting")
    assert len(engine.lessons) == pieces
    engine.idle()
    assert not engine.half.lessons.pending


def test_an_alarm_does_not_ring_in_a_pause_and_is_set_again_behind_it(make_engine: Make) -> None:
    """The quiet time begins anew: who resumes an engine is about to use it."""
    engine = with_lessons(make_engine, audit_idle_seconds=LONG)
    alarm = engine.half.lessons.alarm = Alarm(lambda: None)
    engine.idle()
    assert not engine.scheduler.has_requests(), "the engine sleeps"
    assert alarm._timer is not None
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert not engine.scheduler.has_requests()
    assert alarm._timer is None
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert engine.scheduler.has_requests(), "vLLM's loop goes round once"
    engine.idle()
    assert not engine.scheduler.has_requests()
    assert alarm._timer is not None
    alarm.stop()
