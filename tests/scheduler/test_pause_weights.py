# SPDX-License-Identifier: Apache-2.0
"""New weights begin with nothing: whatever an operator does to change them, no KV and no anchor of
the old ones is used again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words
from test_learning import AGENT, ANCHOR, hear, warm
from test_pause import in_a_lesson, pipelines, with_lessons
from vllm.v1.core.sched.interface import PauseState

from kvcomm_vllm.metrics import KVCommStats

Make = Callable[..., EngineWithoutWorker]
Renew = Callable[[EngineWithoutWorker], None]

QUESTION = words("question", 40)


def reset(**options: bool) -> Renew:
    def call(engine: EngineWithoutWorker) -> None:
        assert engine.scheduler.reset_prefix_cache(**options)
        engine.memory.weights_now += 1

    return call


def update(engine: EngineWithoutWorker) -> None:
    """The weights get another version; vLLM keeps its prefix cache."""
    engine.half.engine.engine = SimpleNamespace(get_weight_version=lambda: "new")


plain = pytest.param(reset(), id="reset")
resets = pytest.mark.parametrize(
    "renew",
    [
        plain,
        pytest.param(reset(reset_running_requests=True), id="reset, requests too"),
        pytest.param(reset(reset_connector=True), id="reset, connector too"),
    ],
)
renewals = pytest.mark.parametrize("renew", [plain, pytest.param(update, id="weight version")])


@resets
@pipelines
def test_anchors_begin_anew(make_engine: Make, renew: Renew, pipeline: int) -> None:
    engine = make_engine(**ANCHOR, num_blocks=256, pipeline=pipeline)
    warm(engine)
    assert hear(engine, 29).report["corrected"] > 0
    engine.idle()
    renew(engine)
    assert hear(engine, 30).report["corrected"] == 0
    assert engine.half.modes["anchor"].table.counts() == (0, 0)
    for number in range(31, 35):
        hear(engine, number)
        engine.idle()
    assert hear(engine, 36).report["corrected"] > 0
    engine.idle()
    check_idle(engine)


def test_another_weight_version_means_new_anchors(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR, num_blocks=256)
    warm(engine)
    update(engine)
    assert hear(engine, 30).report["corrected"] == 0
    assert engine.half.modes["anchor"].table.counts() == (0, 0)


@renewals
def test_text_that_was_read_is_not_found_any_more(make_engine: Make, renew: Renew) -> None:
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION, 5])
    renew(engine)
    assert engine.serve("second", [*AGENT, *QUESTION, 7]).declined == ["no_match"]
    assert engine.serve("third", [*words("three", 20), *QUESTION, 9]).report["reused"] > 0


@renewals
def test_a_conversation_does_not_go_on_in_old_private_pages(
    make_engine: Make, renew: Renew
) -> None:
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION, 5])
    first, answer = [*AGENT, *QUESTION, 7, 8], words("answer", 9)
    assert engine.serve("turn", first, answer).report["reused"] > 0
    renew(engine)
    told = engine.serve("follow-up", [*first, *answer, 9]).report
    assert told["from_approximate"] == 0
    assert told["local"] <= len(AGENT), "vLLM's own prefix hit, without a private page"


def test_what_is_not_changed_is_kept(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR)
    engine.half.engine.engine = SimpleNamespace(get_weight_version=lambda: "old")
    warm(engine)
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.add("running", words("user", 30))
    engine.step()
    assert not engine.scheduler.reset_prefix_cache(), "its pages are in use"
    engine.run()
    assert hear(engine, 30).report["corrected"] > 0


@resets
@pipelines
def test_a_lesson_under_way_is_forgotten_and_hinders_no_reset(
    make_engine: Make, renew: Renew, pipeline: int
) -> None:
    engine = in_a_lesson(make_engine, pipeline=pipeline)
    assert engine.half.lessons._in_flight == (pipeline == 2)
    renew(engine)
    pieces = len(engine.lessons)
    engine.step()
    engine.idle()
    assert len(engine.lessons) == pieces
    assert not engine.half.lessons.pending
    check_idle(engine)


@resets
def test_a_report_that_comes_after_a_reset_teaches_nothing(
    make_engine: Make, renew: Renew, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()
    monkeypatch.setattr(KVCommStats, "count_lesson", lambda stats, what: counts.update([what]))
    engine = with_lessons(make_engine, pipeline=2)
    while not (engine.lessons and engine.lessons[-1].spans):
        engine.step()
    assert engine.half.lessons._in_flight
    assert len(engine.jobs) == 1
    engine.schedule()  # a second step is under way, too
    renew(engine)
    engine.drain()
    assert engine.half.modes["anchor"].table.counts() == (0, 0)
    assert counts == {"queued": 3, "dropped": 3}


def test_requests_that_waited_through_a_reset_are_served_from_new_pages(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR, num_blocks=256)
    warm(engine)
    first, answer = [*AGENT, *words("question 2", 40), 7, 8], words("answer", 9)
    engine.serve("turn", first, answer)
    engine.idle()
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.add("follow-up", [*first, *answer, 9])
    engine.add("other", [*words("two", 20), *words("question 1", 40), 9])
    assert not engine.scheduler.has_requests()
    reset()(engine)
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run("follow-up", "other")
    for name in ("follow-up", "other"):
        told = engine.served[name].report
        assert (told["local"], told["reused"]) == (0, 0)
    engine.idle()
    check_idle(engine)


def test_requests_kept_through_a_reset_go_on_with_new_pages_and_teach_nothing_old(
    make_engine: Make,
) -> None:
    """``POST /pause?mode=keep``: vLLM preempts what runs, empties its cache, and goes on later."""
    engine = make_engine(**ANCHOR, num_blocks=256)
    warm(engine)
    question = words("question 50", 40)
    engine.serve("source", [*words("one", 20), *question, 5])
    kept = engine.add("kept", [*AGENT, *question, 7, 8], words("answer", 9))
    for _ in range(3):
        engine.step()
    assert engine.half.states["kept"].lesson is not None
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert not engine.scheduler.has_requests()
    reset(reset_running_requests=True, reset_connector=True)(engine)
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run("kept")
    assert kept.num_output_tokens == 9
    assert not engine.half.lessons.pending
    check_idle(engine)
