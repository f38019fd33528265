# SPDX-License-Identifier: Apache-2.0
"""Mode paper on vLLM's scheduler: all messages of a prompt are shared, or none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle, check_report
from engine_without_worker import EngineWithoutWorker, Served
from scripts import words

Make = Callable[..., EngineWithoutWorker]

AGENT, MIDDLE, TAIL = words("agent", 21), words("middle", 7), words("tail", 6)
MEMORY = {"memory_mb": 1}
SMALL = {**MEMORY, "anchors": 2, "window": 2}
PAPER = {"mode": "paper", "paper": MEMORY, "min_span_tokens": 12}
ROOMY = {"num_blocks": 256}


def hear(
    engine: EngineWithoutWorker, number: int, length: int = 40, salt: str | None = None
) -> Served:
    """Two agents say something new, this one hears both."""
    first = words(f"first {number}", length)
    second = words(f"second {number}", length)
    for name, text in (("one", first), ("two", second)):
        engine.serve(f"{name} {number}", [*words(name, 20), *text, 5], salt=salt)
    prompt = [*AGENT, *first, *MIDDLE, *second, *TAIL]
    return engine.serve(f"hears {number}", prompt, salt=salt)


def warm(engine: EngineWithoutWorker, rounds: int = 2) -> None:
    for number in range(rounds):
        assert hear(engine, number, 48).declined == ["learning"]
        engine.idle()


def test_messages_and_the_text_behind_them_are_estimated_once_anchors_cover_them(
    make_engine: Make,
) -> None:
    engine = make_engine(**PAPER, **ROOMY)
    warm(engine)
    served = hear(engine, 10)
    check_report(engine, "hears 10")
    assert served.report["corrected"] == served.report["reused"]
    (ops,) = served.loaded
    assert len(ops.estimates) == 2
    assert all(len(op.anchors) == 2 for op in ops.estimates)
    assert not ops.loads
    tail = ops.estimates[-1]
    assert (tail.start, tail.stop) == (served.prompt_tokens - len(TAIL), served.prompt_tokens - 1)
    engine.idle()
    check_idle(engine)


def test_a_message_longer_than_all_anchors_makes_the_request_dense_and_an_anchor(
    make_engine: Make,
) -> None:
    engine = make_engine(**PAPER, **ROOMY)
    warm(engine)
    assert hear(engine, 11, length=60).declined == ["learning"]
    before = engine.half.modes["paper"].table.counts()[1]
    engine.idle()
    assert engine.half.modes["paper"].table.counts()[1] == before + 2


def test_a_gate_that_does_not_open_makes_the_request_dense(make_engine: Make) -> None:
    engine = make_engine(**PAPER, **ROOMY)
    warm(engine)
    engine.probe = lambda op: [[4.0] * len(anchors) for _, anchors in op.spans]
    served = hear(engine, 12)
    assert served.declined == ["learning"]
    assert served.report["reused"] == 0
    engine.idle()
    check_idle(engine)


def test_a_probe_that_fails_makes_the_request_dense(make_engine: Make) -> None:
    engine = make_engine(**PAPER, **ROOMY)
    warm(engine)
    engine.probe = lambda op: None
    assert hear(engine, 13).declined == ["learning"]
    check_idle(engine)


def test_one_message_that_is_not_shareable_makes_all_of_them_dense(make_engine: Make) -> None:
    engine = make_engine(**PAPER, **ROOMY)
    warm(engine)
    engine.probe = lambda op: [[0.0, 1e4], [4.0, 4.0]]
    assert hear(engine, 14).report["reused"] == 0


def test_anchors_used_most_stay_when_the_pool_is_full(make_engine: Make) -> None:
    engine = make_engine(**{**PAPER, "paper": SMALL}, **ROOMY)
    warm(engine)
    table = engine.half.modes["paper"].table
    before = {key: list(record.pool.messages) for key, record in table._records.items()}
    for number in range(20, 23):
        hear(engine, number)  # the first anchor is the near one
    hear(engine, 23, length=60)  # dense: a new anchor for both placeholders
    engine.idle()
    for key, messages in before.items():
        now = table.get(key).pool.messages
        assert messages[0] in now
        assert messages[1] not in now
        assert len(now) == 2


def test_without_room_for_anchors_requests_are_served_exactly(make_engine: Make) -> None:
    engine = make_engine(**PAPER, **ROOMY, paper_rows=0)
    assert hear(engine, 0).declined == ["no_paper_memory"]
    engine.idle()
    assert not engine.lessons
    check_idle(engine)


def test_placeholders_share_a_small_arena_and_the_least_used_ones_go(make_engine: Make) -> None:
    engine = make_engine(**PAPER, **ROOMY, paper_rows=150)
    for number in range(6):
        hear(engine, number, 48)
        engine.idle()
    assert engine.half.modes["paper"].table.counts()[1] >= 1
    check_idle(engine)


def test_two_tenants_have_anchors_of_their_own(make_engine: Make) -> None:
    engine = make_engine(**PAPER, **ROOMY)
    for number in range(2):
        hear(engine, number, 48, salt="a")
        engine.idle()
    assert hear(engine, 3, salt="a").report["corrected"] > 0
    assert hear(engine, 4, salt="b").declined == ["learning"]


def test_a_lesson_that_fails_costs_the_placeholders_what_they_knew(make_engine: Make) -> None:
    engine = make_engine(**PAPER, **ROOMY)
    warm(engine)
    hear(engine, 20, 60)
    engine.fail_lesson = lambda op: True
    engine.idle()
    assert engine.half.modes["paper"].table.counts() == (0, 0)
    assert hear(engine, 21).declined == ["learning"]


def test_a_request_that_is_aborted_while_it_is_probed_leaves_no_page_held(
    make_engine: Make,
) -> None:
    engine = make_engine(**PAPER, **ROOMY)
    warm(engine)
    first = words("first x", 40)
    engine.serve("one x", [*words("one", 20), *first, 5])
    engine.add("hears x", [*AGENT, *first, *MIDDLE, *TAIL])
    engine.schedule()
    assert engine.probes
    engine.abort("hears x")
    engine.drain()
    engine.idle()
    check_idle(engine)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_probes_work_under_asynchronous_scheduling(make_engine: Make, pipeline: int) -> None:
    engine = make_engine(**PAPER, **ROOMY, pipeline=pipeline)
    warm(engine)
    assert hear(engine, 30).report["corrected"] > 0
    assert engine.probes
    engine.idle()
    check_idle(engine)


def test_the_papers_quirks_are_a_switch(make_engine: Make) -> None:
    """Its pool settles above V, ours at V."""
    sizes = {}
    for quirks in (False, True):
        engine = make_engine(**{**PAPER, "paper": {**SMALL, "quirks": quirks}}, **ROOMY)
        engine.probe = lambda op: [[4.0] * len(anchors) for _, anchors in op.spans]
        for number in range(6):
            hear(engine, number, 48)
            engine.idle()
        sizes[quirks] = max(
            len(record.rows) for record in engine.half.modes["paper"].table._records.values()
        )
    assert sizes[False] == 2
    assert sizes[True] > 2
