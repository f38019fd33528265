# SPDX-License-Identifier: Apache-2.0
"""Agents side by side share a text as soon as one has prefilled it, and never wait in vain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words

from kvcomm_vllm.scheduler import sources

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)


def agent(name: str) -> list[int]:
    return [*words((name, "prefix"), 12), *QUESTION, *words((name, "tail"), 3)]


class Clock:
    """Stands in for ``time`` where waiting is timed."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(sources, "time", fake)
    return fake


def scheduled(engine: EngineWithoutWorker) -> set[str]:
    return set(engine.step().num_scheduled_tokens)


def test_agents_side_by_side_share_what_the_first_has_prefilled(make_engine: Make) -> None:
    engine = make_engine()
    for name in ("a", "b", "c"):
        engine.add(name, agent(name), words((name, "answer"), 5))
    assert scheduled(engine) == {"a"}
    assert scheduled(engine) == {"a", "b", "c"}
    engine.run()
    for name in ("b", "c"):
        assert engine.served[name].spans("reused") == [(14, 52)]
        assert engine.served[name].declined == []
    check_idle(engine)


def test_a_waiting_agent_holds_nobody_up(make_engine: Make) -> None:
    engine = make_engine()
    engine.add("a", agent("a"))
    engine.add("b", agent("b"))
    engine.add("stranger", words("stranger", 30))
    assert scheduled(engine) == {"a", "stranger"}


def test_nobody_waits_when_waiting_is_off(make_engine: Make) -> None:
    engine = make_engine(share_inflight_seconds=0)
    for name in ("a", "b"):
        engine.add(name, agent(name))
    assert scheduled(engine) == {"a", "b"}


def test_nobody_waits_for_less_than_is_worth_reusing(make_engine: Make) -> None:
    engine = make_engine(min_reuse_tokens=41)
    for name in ("a", "b"):
        engine.add(name, agent(name))
    assert scheduled(engine) == {"a", "b"}


def test_requests_of_different_tenants_do_not_wait_for_each_other(make_engine: Make) -> None:
    engine = make_engine()
    engine.add("a", agent("a"), salt="red")
    engine.add("b", agent("b"), salt="blue")
    assert scheduled(engine) == {"a", "b"}


def slowly(engine: EngineWithoutWorker, chunk: int) -> EngineWithoutWorker:
    """Prefills take ``chunk`` tokens per step, for the sake of somebody who is answering."""
    engine.add("answering", words("answering", 5), words("long answer", 30))
    engine.step()
    engine.scheduler.scheduler_config.long_prefill_token_threshold = chunk
    return engine


def test_a_wait_ends_after_its_time(make_engine: Make, clock: Clock) -> None:
    engine = slowly(make_engine(share_inflight_seconds=5.0), 8)
    engine.add("slow", agent("slow"))
    engine.add("b", agent("b"))
    assert scheduled(engine) == {"answering", "slow"}
    clock.now += 4.9
    assert scheduled(engine) == {"answering", "slow"}
    clock.now += 0.2
    assert scheduled(engine) == {"answering", "slow", "b"}
    engine.run()
    assert engine.served["b"].loaded == []


def test_the_time_is_for_all_of_a_requests_waits_together(make_engine: Make, clock: Clock) -> None:
    """Or a stream of new agents could keep one waiting for ever."""
    engine = slowly(make_engine(share_inflight_seconds=5.0), 8)
    engine.add("first", agent("first"))
    engine.add("b", agent("b"))
    assert scheduled(engine) == {"answering", "first"}
    engine.abort("first")
    waiting = engine.scheduler.requests["b"]
    engine.scheduler.waiting.remove_request(waiting)  # the next agent overtakes it
    engine.add("next", agent("next"))
    assert scheduled(engine) == {"answering", "next"}
    engine.scheduler.waiting.prepend_request(waiting)
    clock.now += 4.0
    assert scheduled(engine) == {"answering", "next"}
    clock.now += 1.1
    assert scheduled(engine) == {"answering", "next", "b"}


@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_a_wait_ends_when_its_source_does(make_engine: Make, end: str) -> None:
    engine = make_engine(budget=16)
    engine.add("a", agent("a"))
    engine.add("b", agent("b"))
    assert scheduled(engine) == {"a"}
    if end == "abort":
        engine.abort("a")
    else:
        request = engine.scheduler.running.pop()
        engine.scheduler._preempt_request(request, 0.0)
        engine.scheduler.waiting.remove_request(request)
        engine.step()  # the step that sees the preemption
    assert scheduled(engine) == {"b"}


def test_a_plan_with_holes_waits_for_a_prefix_that_this_step_fills(make_engine: Make) -> None:
    """vLLM hits pages that are filled only by the forward; the side forward comes before it."""
    engine = make_engine(share_inflight_seconds=0)
    engine.serve("source", [*words("one", 20), *QUESTION])
    template = words("template", 16)
    engine.add("plain", [*template, *words("unique", 20)])
    engine.add("reader", [*template, *words("gap", 5), *QUESTION, 3])
    assert scheduled(engine) == {"plain"}
    assert "reader" in scheduled(engine)
    engine.run()
    assert engine.served["reader"].spans("local") == [(0, 16)]
    assert engine.served["reader"].spans("reused") == [(23, 61)]


def with_lost_opening(engine: EngineWithoutWorker) -> list[int]:
    """A source whose first four pages were evicted; the text they held."""
    opening = words("opening", 16)
    engine.serve("source", [*opening, *QUESTION])
    (sequence,) = engine.half.store.index._row_of
    pages = [engine.half.pages.lookup(block_hash) for block_hash in sequence.block_hashes[:4]]
    engine.pool.evict_blocks({page.block_id for page in pages if page is not None})
    return opening


def test_a_source_page_that_this_forward_fills_anew_is_read_in_the_next(make_engine: Make) -> None:
    engine = make_engine(share_inflight_seconds=0)
    opening = with_lost_opening(engine)
    engine.add("refill", [*opening, *words("own", 9)], hints={"mode": "off"})
    engine.add("reader", [*words("two", 9), *opening, 3])
    assert scheduled(engine) == {"refill"}
    engine.run()
    assert engine.served["reader"].spans("reused") == [(11, 25)]


def test_a_source_page_that_this_step_fills_anew_is_read_in_the_next(make_engine: Make) -> None:
    """Evicted pages come back under their hash in another request's hole: too late for a load."""
    engine = make_engine(share_inflight_seconds=0)
    opening = with_lost_opening(engine)
    engine.add("refill", [*opening, *QUESTION, 3])
    engine.add("reader", [*words("two", 9), *opening, 3])
    output = engine.step()
    assert [ops.request_id for ops in output.kv_connector_metadata.requests] == ["refill"]
    assert [(hole.start, len(hole.tokens)) for hole in engine.served["refill"].loaded[0].holes] == [
        (0, 16)
    ]
    engine.run()
    assert engine.served["reader"].spans("reused") == [(11, 25)]


def test_two_requests_of_one_template_may_share_a_hole_in_one_step(make_engine: Make) -> None:
    """All rows of the side forward are written before any attends: no reason to wait."""
    engine = make_engine(share_inflight_seconds=0)
    engine.serve("source", [*words("one", 20), *QUESTION])
    template = words("template", 16)
    for name in ("a", "b"):
        engine.add(name, [*template, *words((name, "gap"), 5), *QUESTION, 3])
    assert scheduled(engine) == {"a", "b"}
    engine.run()
    assert [engine.served[name].report["reused"] for name in ("a", "b")] == [38, 38]
    assert engine.served["b"].spans("local") == [(0, 16)]


def test_a_more_urgent_request_reuses_and_goes_first(make_engine: Make) -> None:
    engine = make_engine(policy="priority", max_num_seqs=1)
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.add("later", agent("later"), priority=5)
    engine.add("urgent", agent("urgent"), priority=0)
    assert scheduled(engine) == {"urgent"}
    engine.run()
    assert [engine.served[name].report["reused"] for name in ("urgent", "later")] == [38, 38]
