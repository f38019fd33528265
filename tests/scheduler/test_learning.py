# SPDX-License-Identifier: Apache-2.0
"""Placeholders learn from served prompts while vLLM is idle, and are corrected from then on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words

Make = Callable[..., EngineWithoutWorker]

AGENT = words("agent", 20)
ANCHOR = {
    "mode": "anchor",
    "seam_tokens": 4,
    "anchor_seam_tokens": 2,
    "heal": "off",
    "compares": False,
}


def hear(engine: EngineWithoutWorker, number: int, agent: list[int] = AGENT, **options):
    """Another agent is asked something new, then this one hears the same."""
    question = words(f"question {number}", 40)
    engine.serve(f"first {number}", [*words("one", 20), *question, 5], **options)
    return engine.serve(f"second {number}", [*agent, *question, 7, 8], **options)


def warm(engine: EngineWithoutWorker, rounds: int = 3) -> None:
    for number in range(rounds):
        hear(engine, number)
        engine.idle()


def test_a_placeholder_is_corrected_behind_a_shorter_seam_once_it_is_warm(
    make_engine: Make,
) -> None:
    engine = make_engine(**ANCHOR)
    cold = hear(engine, 100)
    assert cold.report["seam"] == 4
    assert cold.report["corrected"] == 0
    warm(engine)
    after = hear(engine, 101)
    assert after.report["seam"] == 2
    assert after.report["corrected"] == after.report["reused"] > 0
    (op,) = after.loaded[-1].loads
    assert op.entry >= 0
    assert op.placeholder_index == 2
    engine.idle()
    check_idle(engine)


def test_a_placeholder_whose_map_misleads_is_corrected_by_its_means(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR)
    engine.errors = [1.2, 1.0, 1.2, 1.0, 0.5, 0.5]
    warm(engine)
    (op,) = hear(engine, 101).loaded[-1].loads
    assert op.entry >= 0
    assert not op.mapped


def test_a_text_whose_parts_lie_in_two_requests_is_one_anchor(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR, num_blocks=200)
    hear(engine, 0)
    question = words("question", 80)
    engine.serve("one", [*words("one", 20), *question[:48], 5])
    engine.serve("two", [*words("two", 24), *question[16:], 5])
    served = engine.serve("second", [*AGENT, *question, 7, 8])
    assert len(served.loaded[-1].loads) == 2
    assert len(served.report["placeholders"]) == 1
    engine.idle()
    assert any(len(op.spans) == 2 for op in engine.lessons)
    assert engine.half.modes.counts() == (1, 1)


def test_an_audit_computes_the_true_kv_in_pieces_and_gives_its_pages_back(
    make_engine: Make,
) -> None:
    engine = make_engine(**ANCHOR, audit_tokens=16)
    hear(engine, 0)
    hear(engine, 1)
    free = engine.pool.get_num_free_blocks()
    engine.idle()
    holes = [op.hole for op in engine.lessons if op.hole is not None]
    assert len(holes) > 1
    assert all(len(hole.tokens) <= 16 for hole in holes)
    assert engine.pool.get_num_free_blocks() == free
    check_idle(engine)


def test_a_learn_hint_is_served_exactly_and_teaches_without_recomputing(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR)
    hints = {"learn": True}
    for number in range(2):
        served = hear(engine, number, hints=hints)
        assert served.declined == ["learning"]
        assert not served.loaded
        engine.idle()
    recomputed = sum(len(op.hole.tokens) for op in engine.lessons if op.hole is not None)
    assert recomputed < 2 * engine.block_size  # at most what stood in no full page
    assert hear(engine, 2).report["corrected"] > 0


def test_bootstrap_requests_are_served_exactly(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR, bootstrap_requests=2, audits=False)
    for number in range(2):
        assert hear(engine, number).declined == ["learning"]
        engine.idle()
    assert hear(engine, 2).report["corrected"] > 0


def test_a_text_seen_once_is_no_placeholder_to_learn_for(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR)
    for number in range(5):
        hear(engine, number, agent=words(f"agent {number}", 20))
        engine.idle()
    assert not engine.lessons


def test_a_request_ends_a_lesson_at_once_and_it_begins_anew(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR, audit_tokens=8)
    hear(engine, 0)
    hear(engine, 1)
    while not engine.lessons:
        engine.step()
    assert engine.scheduler.has_requests(), "the lesson has more pieces"
    engine.add("user", words("user", 30))
    before = len(engine.lessons)
    engine.run("user")
    assert len(engine.lessons) == before
    engine.idle()
    assert any(op.spans for op in engine.lessons)
    check_idle(engine)


def test_a_request_that_comes_and_goes_while_a_piece_is_under_way_ends_the_lesson_all_the_same(
    make_engine: Make,
) -> None:
    """It may have been given the pages in which the lesson computes."""
    engine = make_engine(**ANCHOR, audit_tokens=8, pipeline=2)
    hear(engine, 0)
    hear(engine, 1)
    while not engine.lessons:
        engine.step()
    (begun,) = engine.lessons
    assert begun.hole is not None
    assert engine.half.lessons._in_flight
    engine.add("user", words("user", 60))
    engine.schedule()
    _, pages = engine.trace[-1]["user"]
    assert begun.block_ids[begun.hole.start // engine.block_size] in pages
    engine.abort("user")
    engine.schedule()  # idle again, and the workers have not answered yet
    engine.drain()
    engine.step()
    assert engine.lessons[1].hole == begun.hole
    engine.idle()
    assert any(op.spans for op in engine.lessons)
    check_idle(engine)


def hear_two(engine: EngineWithoutWorker, number: int, **options):
    """Two agents are told something new, then this one hears both texts."""
    said = [words(f"{name} {number}", 40) for name in ("question", "answer")]
    for text in said:
        engine.serve(f"first {number} {text[0]}", [*words("one", 20), *text, 5], **options)
    prompt = [*AGENT, *said[0], *words("between", 6), *said[1], 7, 8]
    return engine.serve(f"second {number}", prompt, **options)


def test_a_request_waits_for_one_span_of_a_lesson_and_none_is_taught_twice(
    make_engine: Make,
) -> None:
    engine = make_engine(**ANCHOR, num_blocks=256)
    hear_two(engine, 0)
    hear_two(engine, 1)
    while not any(op.spans for op in engine.lessons):
        engine.step()
    assert engine.scheduler.has_requests(), "the lesson has another span to teach"
    engine.serve("user", words("user", 30))
    engine.idle()
    assert [len(op.spans) for op in engine.lessons if op.spans] == [1, 1]
    entries = [op.spans[0].entry for op in engine.lessons if op.spans]
    assert entries[0] != entries[1]
    for number in range(2, 4):
        hear_two(engine, number)
        engine.idle()
    heard = hear_two(engine, 9)
    assert heard.report["corrected"] == heard.report["reused"] > 0
    engine.idle()
    check_idle(engine)


def test_nothing_is_learned_before_the_engine_has_been_idle_for_long(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR | {"audit_idle_seconds": 3600})
    warm(engine)
    assert not engine.lessons
    assert engine.half.lessons.pending


def test_a_failed_lesson_costs_the_placeholder_what_it_knew(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR)
    warm(engine)
    engine.fail_lesson = lambda op: True
    hear(engine, 50)
    engine.idle()
    assert hear(engine, 51).report["corrected"] == 0
    engine.idle()
    check_idle(engine)


def test_two_tenants_with_the_same_text_learn_apart(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR)
    for number in range(3):
        hear(engine, number, salt="a")
        engine.idle()
    assert hear(engine, 3, salt="a").report["corrected"] > 0
    question = words("question b", 40)
    engine.serve("b one", [*words("one", 20), *question, 5], salt="b")
    assert engine.serve("b two", [*AGENT, *question, 7], salt="b").report["corrected"] == 0


def test_a_placeholder_that_loses_its_entry_is_served_as_a_cold_one(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR, placeholders=1, num_blocks=128)
    warm(engine)
    other = words("other agent", 20)
    for number in range(10, 13):
        hear(engine, number, agent=other)
        engine.idle()
    assert hear(engine, 20, agent=other).report["corrected"] > 0
    assert hear(engine, 21).report["corrected"] == 0


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_placeholder_whose_entry_a_lesson_under_way_takes_is_served_as_a_cold_one(
    make_engine: Make, pipeline: int
) -> None:
    """With two steps under way, a request is planned before the lesson is known to be learned."""
    engine = make_engine(**ANCHOR, placeholders=1, num_blocks=128, pipeline=pipeline)
    warm(engine)
    assert hear(engine, 9).report["corrected"] > 0
    engine.idle()
    for number in range(10, 12):
        hear(engine, number, agent=words("other agent", 20))
    question = words("question 20", 40)
    engine.serve("first 20", [*words("one", 20), *question, 5])
    lessons = engine.half.lessons
    for _ in range(100):
        if lessons._active is not None and lessons._active.taught:
            break
        engine.step()
    assert lessons._in_flight == (pipeline == 2)
    served = engine.serve("second 20", [*AGENT, *question, 7, 8])
    assert served.report["reused"] > 0
    assert served.report["corrected"] == 0
    engine.idle()
    check_idle(engine)


def test_an_arena_too_small_for_one_placeholder_means_seams_alone(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR, placeholders=0)
    warm(engine)
    assert not engine.lessons
    served = hear(engine, 9)
    assert served.report["corrected"] == 0
    assert served.report["reused"] > 0


def test_a_pool_without_room_for_an_audit_learns_nothing_and_serves(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR, num_blocks=34)
    warm(engine, rounds=4)
    check_idle(engine)


def test_a_reset_of_the_cache_forgets_what_was_learned(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR)
    warm(engine)
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert hear(engine, 30).report["corrected"] == 0


def test_a_reset_succeeds_between_two_pieces_of_a_lesson(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR, audit_tokens=8)
    hear(engine, 0)
    hear(engine, 1)
    while not engine.lessons:
        engine.step()
    engine.drain()
    assert engine.half.lessons.pending
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert not engine.half.lessons.pending


@pytest.mark.parametrize("pipeline", [1, 2])
def test_other_modes_never_learn(make_engine: Make, pipeline: int) -> None:
    engine = make_engine(mode="seam", heal="off", compares=False, pipeline=pipeline)
    for number in range(3):
        hear(engine, number)
        engine.idle()
    assert not engine.lessons


@pytest.mark.parametrize("pipeline", [1, 2])
def test_learning_goes_on_under_asynchronous_scheduling(make_engine: Make, pipeline: int) -> None:
    engine = make_engine(**ANCHOR, pipeline=pipeline, audit_tokens=16)
    warm(engine, rounds=4)
    assert hear(engine, 60).report["corrected"] > 0
    engine.idle()
    check_idle(engine)


def test_a_learn_hint_is_served_exactly_where_there_is_nothing_to_learn(make_engine: Make) -> None:
    full = make_engine(**ANCHOR, max_anchors=2)
    warm(full)
    assert hear(full, 9).report["corrected"] > 0
    for engine in (
        full,
        make_engine(mode="seam", heal="off", compares=False),
        make_engine(**ANCHOR, placeholders=0),
    ):
        hear(engine, 10)
        assert hear(engine, 11, hints={"learn": True}).declined == ["learning"]


def test_lessons_leave_a_paused_engine_at_rest(make_engine: Make) -> None:
    """vLLM waits with a pause until its loop rests, and counts paused requests itself."""
    engine = make_engine(**ANCHOR)
    hear(engine, 0)
    hear(engine, 1)
    assert engine.half.has_idle_work
    engine.add("waiting", words("user", 30))
    assert engine.half.lessons.pending
    assert not engine.half.has_idle_work
