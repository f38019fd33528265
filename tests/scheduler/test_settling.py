# SPDX-License-Identifier: Apache-2.0
"""What learning puts off is done in idle steps of its own, and counts as learned thereafter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words
from test_learning import AGENT, ANCHOR, hear, warm
from vllm.v1.core.sched.interface import PauseState

from kvcomm_vllm.messages import LessonOp, StepReport

Make = Callable[..., EngineWithoutWorker]

PIECES = 3
pipelines = pytest.mark.parametrize("pipeline", [1, 2])


def slow_learner(make_engine: Make, **options: object) -> EngineWithoutWorker:
    engine = make_engine(**ANCHOR | {"num_blocks": 256} | options)
    engine.settle_pieces = PIECES
    return engine


def taught(engine: EngineWithoutWorker) -> list[int]:
    """Numbers of the lessons that taught a span, once for each span."""
    return [op.number for op in engine.lessons if op.spans]


def until(engine: EngineWithoutWorker, seen: Callable[[LessonOp], bool]) -> None:
    """Step until such a piece has been sent."""
    for _ in range(200):
        engine.step()
        if engine.lessons and seen(engine.lessons[-1]):
            return
    raise AssertionError("no such piece")


@pipelines
def test_a_span_is_settled_in_pieces_before_anything_else_is_learned(
    make_engine: Make, pipeline: int
) -> None:
    engine = slow_learner(make_engine, pipeline=pipeline)
    warm(engine)
    order = ["teach" if op.spans else "settle" for op in engine.lessons if op.hole is None]
    assert order == ["teach", *["settle"] * PIECES] * 2
    assert engine.half.modes.counts() == (1, 2)
    assert hear(engine, 29).report["corrected"] > 0
    engine.idle()
    check_idle(engine)


@pipelines
def test_a_request_in_between_is_served_as_before_and_nothing_is_taught_twice(
    make_engine: Make, pipeline: int
) -> None:
    engine = slow_learner(make_engine, pipeline=pipeline)
    warm(engine, 2)
    assert engine.half.modes.counts() == (1, 1)
    hear(engine, 2)
    until(engine, lambda op: op.settles)
    told = hear(engine, 29).report
    assert told["corrected"] == 0, "the second anchor is not settled"
    engine.idle()
    assert engine.half.modes.counts() == (1, 3)
    assert len(taught(engine)) == len(set(taught(engine))) == 3
    assert hear(engine, 30).report["corrected"] > 0
    engine.idle()
    check_idle(engine)


@pipelines
def test_a_lesson_interrupted_while_it_is_settled_goes_on_with_what_else_it_has(
    make_engine: Make, pipeline: int
) -> None:
    """Its pages may have been given away: what it computes then is computed again."""
    engine = slow_learner(make_engine, pipeline=pipeline, heal="idle", compares=True)
    hear(engine, 0)
    hear(engine, 1)
    until(engine, lambda op: op.settles)
    engine.serve("other", words("other", 300))
    engine.idle()
    assert len(taught(engine)) == len(set(taught(engine)))
    assert not engine.half.lessons.pending
    check_idle(engine)


def test_a_resting_engine_does_not_settle_either(make_engine: Make) -> None:
    engine = slow_learner(make_engine)
    hear(engine, 0)
    hear(engine, 1)
    until(engine, lambda op: op.settles)
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert not engine.scheduler.has_requests()
    before = len(engine.lessons)
    engine.step()
    assert len(engine.lessons) == before
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.idle()
    assert sum(op.settles for op in engine.lessons) == PIECES
    assert engine.half.modes.counts() == (1, 1)


@pipelines
def test_what_cannot_be_settled_makes_its_placeholder_begin_anew(
    make_engine: Make, pipeline: int
) -> None:
    engine = slow_learner(make_engine, pipeline=pipeline)
    warm(engine)
    hear(engine, 29)
    engine.fail_lesson = lambda op: op.settles
    engine.idle()
    assert engine.half.modes.counts() == (0, 0)
    engine.fail_lesson = lambda op: False
    assert hear(engine, 30).report["corrected"] == 0
    for number in range(31, 34):
        hear(engine, number)
        engine.idle()
    assert hear(engine, 35).report["corrected"] > 0
    engine.idle()
    check_idle(engine)


def test_new_weights_forget_what_was_being_settled_and_workers_may_do_the_rest_of_it(
    make_engine: Make,
) -> None:
    """They are told of no reset, and have the rest asked of them with the next lesson's pieces."""
    engine = slow_learner(make_engine)
    hear(engine, 0)
    hear(engine, 1)
    until(engine, lambda op: op.settles)
    left = engine.unsettled
    assert left > 0
    assert engine.scheduler.reset_prefix_cache()
    engine.memory.weights_now += 1
    engine.step()
    assert not engine.half.lessons.pending
    for number in range(2, 5):
        hear(engine, number, agent=[*AGENT, 3, 4, 5, 6])
        engine.idle()
    assert not engine.unsettled
    assert engine.half.modes.counts() == (1, 2)
    check_idle(engine)


def test_one_rank_that_has_put_something_off_is_enough() -> None:
    ranks = [StepReport(lesson=3), StepReport(lesson=3, unsettled=True)]
    assert ranks[0].aggregate(ranks[1]).unsettled
    assert ranks[1].aggregate(ranks[0]).unsettled
    assert not ranks[0].aggregate(ranks[0]).unsettled
