# SPDX-License-Identifier: Apache-2.0
"""While vLLM is idle it is found out how far what was served is from exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words

from kvcomm_vllm.messages import Divergence, StepReport

Make = Callable[..., EngineWithoutWorker]
Heard = list[tuple[str | None, Divergence]]

QUESTION = words("question", 40)
FOUND = Divergence(0.25, False)


def answer(engine: EngineWithoutWorker, length: int = 56, **options) -> None:
    """A prompt of ``length`` tokens is served with another agent's KV."""
    engine.divergence = lambda text: FOUND
    engine.serve("source", [*words("one", 20), *QUESTION])
    prompt = [*words("agent", 10), *QUESTION, *words("tail", length - 50)]
    assert engine.serve("answers", prompt, words("answer", 9), **options).report["reused"] > 30


def asked(engine: EngineWithoutWorker) -> int:
    return sum(op.comparison is not None for op in engine.lessons)


@pytest.mark.parametrize("heal", ["idle", "off"])
@pytest.mark.parametrize("mode", ["rotate", "seam", "anchor"])
@pytest.mark.parametrize("length", [53, 54, 55, 56, 57])
def test_a_request_is_compared_once_and_its_agent_counted(
    make_engine: Make, heard: Heard, heal: str, mode: str, length: int
) -> None:
    """Wherever in a page its last token stands."""
    engine = make_engine(mode=mode, heal=heal, audit_tokens=16)
    answer(engine, length, hints={"agent": "critic"})
    engine.idle()
    assert heard == [("critic", FOUND)]
    assert asked(engine) == 1
    engine.idle()
    check_idle(engine)


def test_an_exact_request_is_not_compared(make_engine: Make, heard: Heard) -> None:
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.serve("exact", [*words("agent", 10), *QUESTION, 5], hints={"mode": "off"})
    engine.idle()
    assert not heard
    assert not engine.lessons


def test_nothing_is_compared_without_audits_or_by_a_model_that_tells_no_tokens(
    make_engine: Make, heard: Heard
) -> None:
    for engine in (make_engine(audits=False), make_engine(compares=False)):
        answer(engine)
        engine.idle()
        assert engine.lessons, "it is healed all the same"
    assert not heard


def test_a_comparison_comes_before_what_only_healing_needs(make_engine: Make, heard: Heard) -> None:
    engine = make_engine(audit_tokens=4)
    answer(engine)
    while not heard:
        engine.step()
    assert engine.lessons[-1].comparison is not None
    before = sum(len(op.hole.tokens) for op in engine.lessons if op.hole is not None)
    engine.idle()
    after = sum(len(op.hole.tokens) for op in engine.lessons if op.hole is not None)
    assert after > before > 30


def test_what_a_request_was_served_from_may_be_gone(make_engine: Make, heard: Heard) -> None:
    engine = make_engine()
    answer(engine)
    sequence = next(s for s in engine.half.store.index._row_of if s.owner == "answers")
    page = engine.half.pages.lookup(sequence.block_hashes[5])
    engine.half.pages.evict([page.block_id])
    engine.idle()
    assert not heard
    assert sequence.first_approximate is None, "healed all the same"
    check_idle(engine)


def test_a_request_that_comes_in_between_does_not_make_it_twice(
    make_engine: Make, heard: Heard
) -> None:
    engine = make_engine(audit_tokens=8, num_blocks=128)
    answer(engine)
    while not asked(engine):
        engine.step()
    engine.serve("user", words("user", 30))
    engine.idle()
    assert len(heard) == 1
    check_idle(engine)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_comparison_that_fails_on_any_rank_ends_the_audit_and_serves_on(
    make_engine: Make, heard: Heard, pipeline: int
) -> None:
    engine = make_engine(pipeline=pipeline)
    engine.fail_lesson = lambda op: op.comparison is not None
    answer(engine)
    engine.idle()
    assert not heard
    assert not engine.half.lessons.pending
    engine.serve("user", words("user", 30))
    check_idle(engine)


def test_ranks_that_are_not_told_the_logits_leave_the_answer_to_the_one_that_is() -> None:
    told, untold = StepReport(lesson=3, divergence=FOUND), StepReport(lesson=3)
    assert told.aggregate(untold).divergence == untold.aggregate(told).divergence == FOUND
    assert untold.aggregate(untold).divergence is None
