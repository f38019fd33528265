# SPDX-License-Identifier: Apache-2.0
"""vLLM's own counts call cached what was not computed: usage, and hits of its connector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words
from test_reports import QUESTION, READER, REUSED, SOURCE, as_reported, cached
from vllm.v1.metrics.stats import PrefixCacheStats

from kvcomm_vllm.compat.scheduler import uncount_hits

Make = Callable[..., EngineWithoutWorker]

LONG = words("long", 80)
LARGE = [*words("instructions", 150), *LONG, 7]
pipelines = pytest.mark.parametrize("pipeline", [1, 2])


class Counted:
    """What vLLM reports of its connector, step by step: it starts each report from nought."""

    def __init__(self, engine: EngineWithoutWorker, each_step: bool = False) -> None:
        self.engine, self.each_step = engine, each_step
        self.hits = self.queries = self.by_source = 0
        self.now = engine.scheduler.connector_prefix_cache_stats = PrefixCacheStats()
        engine.after_step = lambda engine: each_step and self.report()

    def report(self) -> None:
        self.hits += self.now.hits
        self.queries += self.now.queries
        by_source = getattr(self.now, "hits_by_source", {0: self.now.hits})  # before vLLM 0.32
        self.by_source += sum(by_source.values())
        self.now = self.engine.scheduler.connector_prefix_cache_stats = PrefixCacheStats()


def counted(make_engine: Make, **options: Any) -> tuple[EngineWithoutWorker, Counted]:
    engine = make_engine(**{"num_blocks": 256} | options)
    engine.serve("source", SOURCE)
    engine.serve("long", [*words("one", 20), *LONG])
    return engine, Counted(engine, each_step=True)


def agree(engine: EngineWithoutWorker, count: Counted) -> None:
    """Usage, report and hits say the same of all requests since the counting began."""
    count.report()
    names = [name for name in engine.served if name not in ("source", "long")]
    for name in names:
        assert cached(engine, name) == as_reported(engine, name), name
    assert count.hits == sum(engine.served[name].report["reused"] for name in names)
    assert count.by_source == count.hits
    assert engine.half.computed_hits.tokens == 0


@pipelines
def test_seams_and_gaps_are_no_hits(make_engine: Make, pipeline: int) -> None:
    engine, count = counted(make_engine, pipeline=pipeline)
    engine.add("reader", READER, words("answer", 3))
    engine.add("both", [*words("x", 9), *QUESTION, *words("y", 9), *LONG, 3])
    engine.run()
    assert engine.served["reader"].report["reused"] == REUSED
    agree(engine, count)
    assert count.queries == len(READER) + 9 + 40 + 9 + 80 + 1
    check_idle(engine)


@pipelines
def test_holes_computed_over_several_steps_are_no_hits(make_engine: Make, pipeline: int) -> None:
    engine, count = counted(make_engine, pipeline=pipeline, budget=64)
    engine.serve("large", LARGE)
    assert len(engine.served["large"].loaded) > 1
    assert engine.served["large"].report["reused"] == 78
    agree(engine, count)


@pipelines
def test_refreshed_tokens_are_no_hits(make_engine: Make, pipeline: int) -> None:
    """An edit takes the first of two copies away: what had repeated it is computed again."""
    engine, count = counted(make_engine, pipeline=pipeline, max_refresh_share=0.9, seam_tokens=0)
    twice, rest = words("twice", 24), words("rest", 60)
    before = [*words("head", 8), *twice, *words("mid", 20), *rest[:20], *twice, *rest[20:], 3]
    engine.serve("before", before)
    engine.serve("after", [*words("new", 9), *before[32:-1], 4])
    assert engine.served["after"].report["refreshed"] > 0
    agree(engine, count)


@pipelines
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_preempted_request_is_counted_once_as_it_was_admitted_first(
    make_engine: Make, pipeline: int, steps: int
) -> None:
    engine, count = counted(make_engine, pipeline=pipeline)
    engine.add("reader", READER, words("answer", 9))
    for _ in range(steps):
        engine.step()
    engine.drain()
    scheduler = engine.scheduler
    scheduler._preempt_request(scheduler.running.pop(), 0.0)
    engine.run()
    assert engine.served["reader"].report["reused"] == REUSED
    agree(engine, count)
    assert count.queries == len(READER)


def test_a_request_preempted_by_another_one_is_counted_once(make_engine: Make) -> None:
    engine, count = counted(make_engine, num_blocks=48, policy="priority")
    engine.add("reader", READER, words("answer", 60), priority=9)
    for _ in range(5):
        engine.step()
    engine.add("urgent", words("urgent", 120), priority=0)
    engine.run()
    agree(engine, count)


@pytest.mark.parametrize("each_step", [False, True])
def test_hits_of_a_load_that_failed_are_taken_from_the_next_ones(
    make_engine: Make, each_step: bool
) -> None:
    engine, _ = counted(make_engine)
    count = Counted(engine, each_step)
    engine.fail = lambda ops: ops.request_id == "failed"
    engine.serve("failed", READER)
    assert cached(engine, "failed") == as_reported(engine, "failed") == (0, 0, len(READER))
    engine.serve("first", [*words("a", 9), *LONG, 3])
    engine.serve("second", [*words("b", 9), *LONG, 4])
    assert engine.served["first"].report["reused"] > 0
    agree(engine, count)


def test_a_failed_piece_of_several_counts_as_nothing_loaded(make_engine: Make) -> None:
    engine, count = counted(make_engine, budget=64)
    seen: list[object] = []

    def fail(ops: object) -> bool:
        seen.append(ops)
        return len(seen) == 2

    engine.fail = fail
    engine.serve("large", LARGE)
    assert engine.served["large"].declined == ["load_failed"]
    engine.serve("after", [*words("b", 9), *LONG, 4])
    engine.serve("more", [*words("c", 9), *LONG, 4])
    agree(engine, count)


def test_what_is_to_be_taken_is_never_more_than_there_is() -> None:
    sources = pytest.importorskip("vllm.v1.metrics.cache_hit_source")  # vLLM 0.32

    class Scheduler:
        connector_prefix_cache_stats = PrefixCacheStats()

    stats = Scheduler.connector_prefix_cache_stats
    source = next(iter(sources.CacheHitSource))
    stats.record(num_tokens=50, num_hits=30, preempted=False, hits_by_source={source: 30})
    assert uncount_hits(Scheduler, 40) == 10
    assert (stats.hits, stats.hits_by_source[source]) == (0, 0)
    assert uncount_hits(Scheduler, 10) == 10
    assert uncount_hits(object(), 10) == 0
