# SPDX-License-Identifier: Apache-2.0
"""Work that is too large for one step is done in several: nobody waits longer, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from checks import check_all, check_idle, check_report, exactly_hashed
from engine_without_worker import EngineWithoutWorker
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import words
from vllm.v1.core.sched.interface import PauseState

from kvcomm_vllm.messages import HoleOp, LoadOp, RequestOps, StepReport
from kvcomm_vllm.scheduler.spread import SpreadPlans

Make = Callable[..., EngineWithoutWorker]

SHARED = words("shared", 80)
OWN = words("instructions", 150)
LARGE = [*OWN, *SHARED, *words("tail", 7)]


def engine_with_source(make_engine: Make, **options: Any) -> EngineWithoutWorker:
    engine = make_engine(num_blocks=256, budget=options.pop("budget", 64), **options)
    engine.serve("source", [*words("one", 20), *SHARED])
    return engine


def pieces(engine: EngineWithoutWorker, name: str) -> list[int]:
    """Tokens of the holes of each piece that was computed for a request."""
    return [sum(len(hole.tokens) for hole in ops.holes) for ops in engine.served[name].loaded]


def test_holes_larger_than_a_step_are_computed_over_several(make_engine: Make) -> None:
    engine = engine_with_source(make_engine)
    large = engine.serve("large", LARGE)
    assert large.spans("reused") == [(152, 230)]
    assert pieces(engine, "large") == [64, 64, 24]
    assert [len(ops.loads) for ops in large.loaded] == [1, 0, 0]
    check_report(engine, "large")
    check_idle(engine)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_its_text_is_findable_and_its_pages_private_as_ever(
    make_engine: Make, pipeline: int
) -> None:
    engine = engine_with_source(make_engine, pipeline=pipeline)
    engine.after_step = check_all
    engine.serve("large", LARGE, words("answer", 20))
    known = exactly_hashed(engine)
    follow_up = engine.serve("turn", [*LARGE, *words("answer", 20), *words("next", 9)])
    assert follow_up.report["local"] >= len(LARGE)
    other = engine.serve("other", [*words("x", 9), *LARGE])
    assert other.report["reused"] > 200
    assert engine.exact_pages.keys() & known <= engine.exact_pages.keys()
    check_idle(engine)


def test_running_decodes_go_on_beside_the_pieces(make_engine: Make) -> None:
    """No step computes more than vLLM's own budget allows."""
    engine = engine_with_source(make_engine)
    engine.add("talker", words("talk", 9), words("answer", 40))
    for _ in range(3):
        engine.step()
    engine.add("large", LARGE)
    while "large" in engine.scheduler.requests:
        loaded = len(engine.served["large"].loaded)
        output = engine.step()
        new = engine.served["large"].loaded[loaded:]
        side = sum(len(hole.tokens) for ops in new for hole in ops.holes)
        assert side + output.total_num_scheduled_tokens <= 64
        if "talker" in engine.scheduler.requests:
            assert output.num_scheduled_tokens.get("talker") == 1
    engine.run()
    check_idle(engine)


def test_prefill_of_others_leaves_a_little_of_each_step(make_engine: Make) -> None:
    engine = engine_with_source(make_engine)
    engine.add("large", LARGE)
    engine.step()
    for number in range(6):
        engine.add(f"busy{number}", words(("busy", number), 64))
        engine.step()
    assert pieces(engine, "large")[1:3] == [8, 8]
    engine.run()
    check_idle(engine)


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("steps", range(1, 6))
def test_a_client_that_hangs_up_in_between_leaves_nothing_behind(
    make_engine: Make, steps: int, pipeline: int
) -> None:
    engine = engine_with_source(make_engine, pipeline=pipeline)
    engine.after_step = check_all
    engine.add("large", LARGE)
    for _ in range(steps):
        engine.step()
    engine.abort("large")
    engine.idle()
    check_idle(engine)
    again = engine.serve("again", LARGE)
    assert again.report["reused"] + again.report["local"] > 0
    check_idle(engine)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_piece_that_fails_is_computed_by_vllm(make_engine: Make, failing: int) -> None:
    engine = engine_with_source(make_engine)
    engine.after_step = check_all
    seen: list[RequestOps] = []

    def fail(ops: RequestOps) -> bool:
        seen.append(ops)
        return len(seen) == failing + 1

    engine.fail = fail
    large = engine.serve("large", LARGE)
    assert large.report["reused"] == 0
    assert large.declined == ["load_failed"]
    assert large.report["computed"] + large.report["local"] == len(LARGE)
    check_idle(engine)
    engine.fail = lambda ops: False
    assert engine.serve("again", LARGE, hints={"mode": "off"}).report["computed"] > 0
    check_idle(engine)


def test_a_request_preempted_afterwards_is_planned_anew(make_engine: Make) -> None:
    engine = engine_with_source(make_engine)
    engine.add("large", LARGE, words("answer", 30))
    while not engine.scheduler.running:
        engine.step()
    engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.after_step = check_all
    engine.run()
    check_idle(engine)


def test_two_large_plans_share_the_steps_in_order(make_engine: Make) -> None:
    engine = engine_with_source(make_engine)
    engine.add("first", LARGE)
    engine.add("second", [*words("others", 150), *SHARED, 3])
    engine.run()
    assert sum(pieces(engine, "first")) == sum(pieces(engine, "second")) == 152
    assert engine.served["second"].report["reused"] == 78
    check_idle(engine)


# ---- beside other requests -----------------------------------------------------------------------


@pytest.mark.parametrize("budget", [2048, 4096, 8192, 16384])
def test_vllms_default_budgets_leave_room_for_what_agents_compute(budget: int) -> None:
    """Some 150 tokens of holes, three times over; and no decode feels more than 2,048 of them."""
    plans = SpreadPlans(budget)
    assert 3 * 150 < plans.at_once(alone=False) <= min(budget // 4, 2048)
    assert plans.at_once(alone=True) == budget


def with_talker(engine: EngineWithoutWorker) -> EngineWithoutWorker:
    engine.add("talker", words("talk", 9), words("answer", 60))
    for _ in range(3):
        engine.step()
    return engine


def step_sizes(engine: EngineWithoutWorker) -> tuple[int, int]:
    """Tokens that one step computes in vLLM's forward, and in holes."""
    loaded = {name: len(served.loaded) for name, served in engine.served.items()}
    output = engine.step()
    side = sum(
        len(hole.tokens)
        for name, served in engine.served.items()
        for ops in served.loaded[loaded[name] :]
        for hole in ops.holes
    )
    return output.total_num_scheduled_tokens, side


@pytest.mark.parametrize("pipeline", [1, 2])
def test_beside_a_running_decode_holes_are_little_on_top_of_the_budget(
    make_engine: Make, pipeline: int
) -> None:
    """A quarter of it at once, an eighth of it as pieces where prefill fills the step."""
    engine = with_talker(engine_with_source(make_engine, pipeline=pipeline))
    for number in range(6):
        engine.add(f"reader{number}", [*words(("own", number), 11), *SHARED, number])
    engine.add("large", LARGE)
    for number in range(4):
        engine.add(f"busy{number}", words(("busy", number), 64))
    sides = []
    while len(engine.scheduler.requests) > 1:
        forward, side = step_sizes(engine)
        assert forward <= 64
        assert side <= 16 + 8 or forward + side <= 64
        sides.append(side)
    assert sum(sides) == 6 * 13 + 152
    for number in range(6):
        assert engine.served[f"reader{number}"].report["reused"] == 78
    engine.run()
    check_idle(engine)


def test_the_same_holes_of_a_request_that_is_alone_are_computed_in_its_step(
    make_engine: Make,
) -> None:
    reader = [*words("own", 30), *SHARED, 7]
    engine = engine_with_source(make_engine)
    engine.add("alone", reader)
    assert step_sizes(engine) == (1, 32)
    assert engine.served["alone"].outputs
    engine.run()
    engine = with_talker(engine_with_source(make_engine))
    engine.add("beside", reader)
    assert step_sizes(engine) == (1, 32)
    assert step_sizes(engine) == (2, 0)
    engine.run()
    assert engine.served["beside"].report["reused"] == 78
    check_idle(engine)


def test_an_agents_usual_holes_cost_no_step_beside_others(make_engine: Make) -> None:
    engine = make_engine(num_blocks=1024, budget=2048)
    shared = words("shared", 700)
    engine.serve("source", [*words("one", 20), *shared])
    with_talker(engine)
    for number in range(3):
        engine.add(f"agent{number}", [*words(("agent", number), 148), *shared, number])
    assert step_sizes(engine) == (4, 3 * 150)
    assert all(engine.served[f"agent{number}"].outputs for number in range(3))
    engine.run()
    check_idle(engine)


holes = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@given(holes, st.lists(st.integers(0, 70), min_size=1, max_size=40), st.integers(1, 64))
@settings(deadline=None)
def test_pieces_are_the_holes_in_order_and_none_is_too_large(
    lengths: list[int], rooms: list[int], limit: int
) -> None:
    at, given_holes = 0, []
    for length in lengths:
        given_holes.append(HoleOp(at, list(range(at, at + length))))
        at += length + 3
    plans = SpreadPlans(64, limit)
    plans.add(RequestOps("r", [1], [LoadOp([0], 0, 0, 0, 1)], given_holes))
    computed: list[int] = []
    ended = False
    for step in range(1000):
        room = rooms[step % len(rooms)]
        (piece,) = plans.next_pieces(room)
        size = sum(len(hole.tokens) for hole in piece.holes)
        assert size <= max(min(room, limit), -(-limit // 8))
        assert len(piece.loads) == (step == 0)
        for hole in piece.holes:
            assert hole.tokens[0] == hole.start
            computed += hole.tokens
        report = plans.on_report(StepReport(done={"r"}))
        ended = piece.last
        assert report.done == ({"r"} if ended else set())
        if ended:
            break
    assert ended
    assert computed == [token for hole in given_holes for token in hole.tokens]
    assert plans.next_pieces(64) == []


@pytest.mark.parametrize("paused", [False, True])
def test_an_operator_resets_while_it_waits_and_it_begins_anew(
    make_engine: Make, paused: bool
) -> None:
    """vLLM itself raises where a request waits for its KV."""
    engine = engine_with_source(make_engine)
    engine.add("large", LARGE, words("answer", 9))
    for _ in range(2):
        engine.step()
    if paused:
        engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        engine.rest()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    assert engine.served["large"].report["computed"] == len(LARGE)
    check_report(engine, "large")
    check_idle(engine)


def test_a_reset_after_its_client_has_hung_up_frees_its_pages(make_engine: Make) -> None:
    engine = engine_with_source(make_engine)
    engine.add("large", LARGE)
    for _ in range(2):
        engine.step()
    engine.abort("large")
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.idle()
    check_idle(engine)
