# SPDX-License-Identifier: Apache-2.0
"""A load that fails is computed within its step: its request goes on, with or without steps in
flight, and what it has is as good as any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checks import check_all, check_idle, check_report
from engine_without_worker import EngineWithoutWorker
from scripts import words

from kvcomm_vllm.metrics import KVCommStats

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
READER = [*words("two", 9), *QUESTION, *words("tail", 7)]
LARGE = [*words("instructions", 150), *QUESTION, *words("tail", 7)]

in_flight = pytest.mark.parametrize("pipeline", [1, 2])


def broken(make_engine: Make, **options: Any) -> EngineWithoutWorker:
    """The source is there, and no load brings it."""
    engine = make_engine(**options)
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.break_load = lambda ops: True
    return engine


@in_flight
@pytest.mark.parametrize("answer", [[1], words("answer", 6)], ids=["one token", "several"])
def test_a_failed_load_never_ends_a_request_and_is_said(
    make_engine: Make, pipeline: int, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[str, str] = {}
    monkeypatch.setattr(
        KVCommStats, "count_request", lambda stats, state: counted.update({state.id: state.outcome})
    )
    engine = broken(make_engine, pipeline=pipeline)
    second = engine.serve("second", READER, answer)
    assert [token for o in second.outputs for token in o.new_token_ids] == answer
    assert str(second.outputs[-1].finish_reason) == "length"
    assert second.spans("computed") == [(0, len(READER))]
    assert second.declined == ["load_repaired"]
    assert counted["second"] == "failed"
    assert second.outputs[0].kv_transfer_params["kvcomm"]["declined"] == {"load_repaired": 1}
    check_idle(engine)


@in_flight
def test_vllm_counts_none_of_it_as_cached(make_engine: Make, pipeline: int) -> None:
    engine = broken(make_engine, pipeline=pipeline)
    second = engine.serve("second", READER)
    (stats,) = [output.prefill_stats for output in second.outputs if output.prefill_stats]
    assert (stats.num_cached_tokens, stats.num_computed_tokens) == (0, len(READER))


def test_the_message_has_the_plan_to_its_end_and_nothing_twice(make_engine: Make) -> None:
    engine = make_engine(num_blocks=256, budget=64)
    engine.serve("source", [*words("one", 20), *QUESTION])
    for prompt in (READER, LARGE):
        first, *others = engine.serve(str(len(prompt)), prompt).loaded
        plan = np.frombuffer(first.tokens, np.int32).tolist()
        end = max(load.prompt_start + load.length for load in first.loads)
        assert plan == prompt[first.first_token : end]
        assert all(piece.tokens == b"" for piece in others)


@in_flight
def test_a_plan_of_many_pieces_is_computed_with_the_first(make_engine: Make, pipeline: int) -> None:
    """No later piece may be needed: with steps in flight, the last of them may be on its way."""
    engine = broken(make_engine, num_blocks=256, budget=64, pipeline=pipeline)
    large = engine.serve("large", LARGE, words("answer", 5))
    assert large.declined == ["load_repaired"]
    assert len(large.loaded) <= pipeline  # pieces that were sent before the first came back
    check_report(engine, "large")
    check_idle(engine)


@in_flight
def test_its_neighbours_are_loaded_as_ever(make_engine: Make, pipeline: int) -> None:
    engine = broken(make_engine, share_inflight_seconds=0, pipeline=pipeline)
    engine.break_load = lambda ops: ops.request_id == "second"
    engine.add("second", READER)
    engine.add("third", [*words("three", 14), *QUESTION, 3])
    engine.run()
    assert engine.served["second"].declined == ["load_repaired"]
    assert engine.served["third"].report["reused"] == 38
    check_idle(engine)


@in_flight
def test_what_was_computed_instead_is_a_source_for_others(make_engine: Make, pipeline: int) -> None:
    engine = broken(make_engine, pipeline=pipeline)
    engine.serve("second", READER, words("answer", 30))
    engine.break_load = lambda ops: False
    listener = engine.serve("listener", [*words("three", 5), *words("answer", 28), 3])
    assert listener.report["reused"] > 20
    check_idle(engine)


@in_flight
@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_it_may_end_or_be_preempted_right_afterwards(
    make_engine: Make, pipeline: int, end: str
) -> None:
    engine = broken(make_engine, pipeline=pipeline)
    engine.add("second", READER, words("answer", 6))
    engine.schedule()
    if end == "abort":
        engine.abort("second")
    engine.drain()
    check_all(engine)
    if end == "preempt":
        engine.scheduler._preempt_request(engine.scheduler.running.pop(), 0.0)
    engine.run()
    check_idle(engine)


def test_an_audit_of_it_says_nothing_of_placeholders(make_engine: Make) -> None:
    """Its KV is exact: audits would find what nobody reused without fault."""
    engine = broken(make_engine, fidelity_budget=0.005, audits=True)
    uses: list[object] = []
    engine.half.audits.ledger.audited = lambda used, kl: uses.extend(used)  # type: ignore[method-assign]
    engine.serve("second", READER)
    engine.idle()
    assert uses == []
    check_idle(engine)
