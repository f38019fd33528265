# SPDX-License-Identifier: Apache-2.0
"""From the counters one can tell how many lessons wait: what was queued and has not ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from engine_without_worker import EngineWithoutWorker
from scripts import words
from test_learning import ANCHOR, hear, warm

from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.scheduler.idle import lesson_queue as lessons

Make = Callable[..., EngineWithoutWorker]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """All that was ever counted; vLLM takes the counts away with every step."""
    found: Counter[str] = Counter()
    monkeypatch.setattr(KVCommStats, "count_lesson", lambda stats, outcome: found.update([outcome]))
    return found


def waiting(counts: Counter[str]) -> int:
    return counts["queued"] - counts["learned"] - counts["dropped"] - counts["failed"]


def test_a_lesson_is_queued_with_its_request_and_ends_while_idle(
    make_engine: Make, counts: Counter[str]
) -> None:
    engine = make_engine(**ANCHOR)
    hear(engine, 0)
    hear(engine, 1)
    assert counts == {"queued": 1}
    engine.idle()
    assert counts == {"queued": 1, "learned": 1}


def test_anchors_from_approximate_kv_are_counted_as_such(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Counter[bool] = Counter()
    monkeypatch.setattr(
        KVCommStats, "count_taught", lambda stats, approximate: found.update([approximate])
    )
    engine = make_engine(**ANCHOR, num_blocks=256)
    for number in range(3):
        question, answer = (words(f"{name} {number}", 40) for name in ("question", "answer"))
        engine.serve(f"asked {number}", [*words("one", 20), *question, 5])
        engine.serve(f"answers {number}", [*words("two", 20), *question, *answer, 5])
        engine.serve(f"hears {number}", [*words("three", 20), *answer, 7, 8])
        engine.idle()
    assert set(found) == {False, True}, "the question was computed, the answer stands behind it"


def test_a_failed_lesson_does_not_wait(make_engine: Make, counts: Counter[str]) -> None:
    engine = make_engine(**ANCHOR)
    warm(engine)
    engine.fail_lesson = lambda op: True
    hear(engine, 50)
    assert waiting(counts) == 1
    engine.idle()
    assert counts["failed"] == 1
    assert waiting(counts) == 0


def test_lessons_that_find_no_place_or_are_reset_do_not_wait(
    make_engine: Make, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lessons, "MAX_LESSONS", 2)
    engine = make_engine(**ANCHOR | {"audit_idle_seconds": 3600})
    for number in range(5):
        hear(engine, number)
    assert counts["dropped"] > 0
    assert waiting(counts) == 2
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert waiting(counts) == 0
    assert not engine.half.lessons.pending
