# SPDX-License-Identifier: Apache-2.0
"""A load that fails costs time, nothing else: nobody is served what was not written."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from checks import cached_pages, check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words

from kvcomm_vllm.compat.scheduler import recovers_failed_loads

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
READER = [*words("two", 9), *QUESTION, *words("tail", 7)]


def with_failure(engine: EngineWithoutWorker, *names: str) -> None:
    """The source is there, and the next load of each of ``names`` fails."""
    engine.serve("source", [*words("one", 20), *QUESTION])
    left = set(names)

    def fail(request: object) -> bool:
        name = request.request_id  # type: ignore[attr-defined]
        failing = name in left
        left.discard(name)
        return failing

    engine.fail = fail


def test_a_failed_load_is_recomputed_and_said_so(make_engine: Make) -> None:
    engine = make_engine()
    with_failure(engine, "second")
    second = engine.serve("second", READER, words("answer", 6))
    assert second.finished
    assert second.loaded == []
    assert second.spans("computed") == [(0, 56)]
    assert second.declined == ["load_failed"]
    assert second.report["placeholders"] == []
    check_idle(engine)


def test_nothing_is_shared_from_a_failed_request(make_engine: Make) -> None:
    engine = make_engine()
    with_failure(engine, "second")
    engine.serve("second", READER, words("answer", 30))
    assert [sequence.owner for sequence in engine.half.store.index._row_of] == ["source"]
    listener = engine.serve("listener", [*words("three", 5), *words("answer", 30)])
    assert listener.loaded == []


def test_all_loads_of_the_step_fail_together_and_recover(make_engine: Make) -> None:
    engine = make_engine(share_inflight_seconds=0)
    with_failure(engine, "second")
    engine.add("second", READER, words("answer", 6))
    engine.add("third", [*words("three", 14), *QUESTION, 3], words("other", 6))
    engine.run()
    for name in ("second", "third"):
        assert engine.served[name].declined == ["load_failed"]
    check_idle(engine)


@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_pages_of_a_failed_load_are_never_found_if_its_request_ends_before_recomputing(
    make_engine: Make, end: str
) -> None:
    """Holes before the first reused token have exact hashes, and vLLM keeps them in its cache."""
    engine = make_engine()
    with_failure(engine, "second")
    engine.add("second", READER, words("answer", 6))
    engine.step()
    if end == "abort":
        engine.abort("second")
        exact_pages = 0
    else:
        engine.scheduler._preempt_request(engine.scheduler.running.pop(), 0.0)
        exact_pages = 2  # it is resumed first, and computes its own prefix densely
    for block_hash, block in cached_pages(engine):
        if block_hash in engine.partial_names:
            continue
        assert block.block_id in engine.memory.full_pages(), block_hash
    engine.serve("exact", [*READER, 3], hints={"mode": "off"})
    assert engine.served["exact"].report["local"] == exact_pages * engine.block_size
    engine.run()
    check_idle(engine)


def test_a_neighbour_on_the_lost_pages_is_not_a_source_either(make_engine: Make) -> None:
    """It takes a hole of the first request as its cached prefix in the very step that fails."""
    engine = make_engine(share_inflight_seconds=0)
    with_failure(engine, "second")
    engine.add("second", READER)
    engine.add("neighbour", [*READER[:8], *words("else", 30)], words("answer", 20))
    engine.step()
    assert engine.trace[-1].keys() == {"second", "neighbour"}
    engine.abort("second")
    engine.abort("neighbour")
    third = engine.serve("third", [*words("x", 9), *READER[:8], *words("else", 30), 3])
    assert third.loaded == []
    check_idle(engine)


@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_who_shares_lost_pages_does_not_count_on_another_to_compute_them(
    make_engine: Make, end: str
) -> None:
    """vLLM has the first of them compute the pages, and lets the others read them at once."""
    engine = make_engine(share_inflight_seconds=0)
    with_failure(engine, "second")
    answer = words("answer", 6)
    engine.add("second", READER, answer)
    engine.add("neighbour", [*READER[:40], *words("else", 30)], answer)
    engine.step()
    first, second = (engine.trace[-1][name][1] for name in ("second", "neighbour"))
    assert first[:2] == second[:2], "computed before what was to be loaded for the first of them"
    if end == "abort":
        engine.abort("second")
    else:
        preempted = engine.scheduler.running.pop(0)
        engine.scheduler._preempt_request(preempted, 0.0)
        engine.abort(preempted.request_id)
    engine.run()
    assert engine.served["neighbour"].finished
    check_idle(engine)


def test_reuse_goes_on_after_a_failure(make_engine: Make) -> None:
    engine = make_engine()
    with_failure(engine, "second")
    engine.serve("second", READER)
    assert engine.serve("third", [*words("three", 14), *QUESTION, 3]).report["reused"] == 38


def test_where_vllm_cannot_compute_again_a_load_that_cannot_be_repaired_ends_its_request(
    make_engine: Make,
) -> None:
    """vLLM 0.32 sets neither steps in flight nor model runner V2's counters back."""
    assert make_engine().scheduler.recompute_kv_load_failures
    assert not make_engine(pipeline=2).scheduler.recompute_kv_load_failures
    scheduler = SimpleNamespace(async_scheduling=False)
    for newer in (False, True):
        config: Any = SimpleNamespace(scheduler_config=scheduler, use_v2_model_runner=newer)
        assert recovers_failed_loads(config) is not newer
