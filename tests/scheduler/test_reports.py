# SPDX-License-Identifier: Apache-2.0
"""What outputs tell the front end: a request's report, whichever way it ends, and how many tokens
of its prompt were cached.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from checks import check_idle, check_report
from engine_without_worker import EngineWithoutWorker
from scripts import words
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import PrefixCacheStats

from kvcomm_vllm.compat.scheduler import add_reports

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
SOURCE = [*words("one", 20), *QUESTION]
READER = [*words("two", 9), *QUESTION, *words("tail", 7)]
REUSED, SEAM = 38, 2


def told(engine: EngineWithoutWorker, name: str) -> list[Any]:
    """The report of each output, or None."""
    params = [output.kv_transfer_params for output in engine.served[name].outputs]
    return [given and given["kvcomm"] for given in params]


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("budget", [16, 256], ids=["chunks", "at once"])
def test_the_first_output_and_the_last_bring_the_same_report(
    make_engine: Make, pipeline: int, budget: int
) -> None:
    engine = make_engine(pipeline=pipeline, budget=budget)
    engine.serve("source", SOURCE)
    engine.serve("second", READER, words("answer", 6))
    first, *between, last = told(engine, "second")
    assert between == [None] * 4
    assert first == last
    assert first["reused"] == REUSED
    check_report(engine, "second")


def test_a_single_output_brings_one_report(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", SOURCE)
    engine.serve("second", READER, [5])
    (report,) = told(engine, "second")
    assert report["reused"] == REUSED


def test_a_request_that_is_served_exactly_says_so_with_its_first_output(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", SOURCE)
    engine.serve("second", READER, words("answer", 3), hints={"mode": "off"})
    first, between, last = told(engine, "second")
    assert (first["mode"], first["reused"], first["declined"]) == ("off", 0, {"mode_off": 1})
    assert (between, last) == (None, first)


def test_no_output_brings_a_report_that_is_not_wanted(make_engine: Make) -> None:
    engine = make_engine(report=False)
    engine.serve("source", SOURCE)
    engine.serve("second", READER, words("answer", 3))
    assert engine.served["second"].loaded
    assert told(engine, "second") == [None] * 3


def test_a_failed_load_is_in_the_first_report(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", SOURCE)
    engine.fail = lambda ops: True
    engine.serve("second", READER, words("answer", 3))
    first, _, last = told(engine, "second")
    assert (first["reused"], first["declined"]) == (0, {"load_failed": 1})
    assert first == last


@pytest.mark.parametrize("budget", [256, 64], ids=["in one step", "in pieces"])
def test_a_load_that_ends_its_request_is_what_its_report_names(
    make_engine: Make, budget: int
) -> None:
    """With steps in flight vLLM computes nothing again, and asks for the report before it passes
    the workers' word on.
    """
    engine = make_engine(pipeline=2, num_blocks=256, budget=budget)
    engine.serve("source", SOURCE)
    engine.fail = lambda ops: True
    prompt = [*words("instructions", 150), *READER]
    second = engine.serve("second", prompt, [1])  # no step in flight reads what was not written
    assert [output.finish_reason for output in second.outputs] == [FinishReason.ERROR]
    assert (second.report["reused"], second.declined) == (0, ["load_failed"])
    check_idle(engine)


@pytest.mark.parametrize("steps", [1, 6], ids=["before its first output", "later"])
def test_a_request_that_ends_with_an_error_has_its_report(make_engine: Make, steps: int) -> None:
    """vLLM ends it by itself, and gives the connector's word to nobody."""
    engine = make_engine(budget=16)
    engine.serve("source", SOURCE)
    engine.add("second", [*READER, *words("more", 30)], words("answer", 9))
    for _ in range(steps):
        engine.step()
    engine.scheduler.grammar_compile_error_reqs.add("second")
    engine.run()
    outputs = engine.served["second"].outputs
    assert outputs[-1].finish_reason == FinishReason.ERROR
    assert bool(outputs[:-1]) == (steps > 1)
    assert told(engine, "second")[-1]["reused"] == REUSED
    check_idle(engine)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_stop_string_is_seen_late_and_what_was_computed_is_found(
    make_engine: Make, pipeline: int
) -> None:
    """The front end answers with the 20th token; the engine, which hears of it later, goes on."""
    engine = make_engine(pipeline=pipeline)
    engine.serve("source", SOURCE)
    engine.add("speaker", READER, words("answer", 60))
    while len(engine.served["speaker"].outputs) < 20:
        engine.step()
    engine.step()
    engine.abort("speaker")
    computed = len(engine.served["speaker"].outputs)
    first, *others = told(engine, "speaker")
    assert first["reused"] == REUSED
    assert others == [None] * (computed - 1)
    listener = engine.serve("listener", [*words("three", 9), *words("answer", 20), 3])
    assert listener.spans("reused") == [(9 + SEAM, 9 + 20)]
    engine.run()
    check_idle(engine)


def test_reports_that_fail_cost_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("kvcomm_vllm.compat.scheduler.logger.exception", said.append)
    answer = SimpleNamespace(request_id="second", kv_transfer_params=None)

    def update() -> dict[int, Any]:
        return {0: SimpleNamespace(outputs=[answer])}

    def tell(request_id: str) -> dict[str, Any]:
        raise KeyError(request_id)

    scheduler = SimpleNamespace(update_from_output=update)
    add_reports(scheduler, tell)
    for _ in range(2):
        assert scheduler.update_from_output()[0].outputs == [answer]
    assert len(said) == 1
    assert scheduler.update_from_output is update


def test_what_ended_is_not_remembered(make_engine: Make) -> None:
    engine = make_engine()
    for number in range(3):
        engine.add(f"r{number}", words(number, 20), words("answer", 9))
        engine.step()
        engine.abort(f"r{number}")
    engine.serve("last", words("last", 20))
    engine.step()
    assert engine.half.reports._ended == {}


# ---- cached tokens ------------------------------------------------------------------------------


def cached(engine: EngineWithoutWorker, name: str) -> tuple[int, int, int]:
    """What vLLM tells of a prompt: tokens from its own cache, from its connector, computed."""
    (stats,) = [o.prefill_stats for o in engine.served[name].outputs if o.prefill_stats]
    assert stats.num_cached_tokens == stats.num_local_cached_tokens + (
        stats.num_external_cached_tokens
    )
    return (
        stats.num_local_cached_tokens,
        stats.num_external_cached_tokens,
        stats.num_computed_tokens,
    )


def as_reported(engine: EngineWithoutWorker, name: str) -> tuple[int, int, int]:
    report = engine.served[name].report
    return report["local"], report["reused"], report["computed"]


@pytest.mark.parametrize("pipeline", [1, 2])
def test_seams_and_gaps_are_not_counted_as_cached(make_engine: Make, pipeline: int) -> None:
    engine = make_engine(pipeline=pipeline)
    engine.serve("source", SOURCE)
    engine.serve("other", words("more", 20))
    engine.serve("mine", words("two", 8))
    engine.serve("second", [*READER, *words("more", 20), 4], words("answer", 3))
    local, reused, computed = cached(engine, "second")
    assert (local, reused, computed) == as_reported(engine, "second")
    assert (local, reused) == (8, REUSED + 18)
    for name in ("source", "other", "mine"):
        assert cached(engine, name) == as_reported(engine, name)


def test_tokens_of_a_failed_load_are_not_counted_as_cached(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", SOURCE)
    engine.fail = lambda ops: True
    engine.serve("second", READER)
    assert cached(engine, "second") == as_reported(engine, "second") == (0, 0, len(READER))


def test_a_preempted_request_counts_as_it_was_admitted_first(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", SOURCE)
    engine.add("second", READER, words("answer", 9))
    engine.step()
    scheduler = engine.scheduler
    scheduler._preempt_request(scheduler.running.pop(), 0.0)
    engine.run()
    assert cached(engine, "second") == as_reported(engine, "second")
    assert engine.served["second"].report["reused"] == REUSED


def test_vllms_count_of_hits_is_what_was_loaded(make_engine: Make) -> None:
    engine = make_engine()
    stats = engine.scheduler.connector_prefix_cache_stats = PrefixCacheStats()
    engine.serve("source", SOURCE)
    assert stats.hits == 0
    engine.serve("second", READER)
    assert stats.hits == REUSED
    assert list(getattr(stats, "hits_by_source", {0: REUSED}).values()) == [REUSED]  # 0.32
    engine.serve("third", [*words("three", 5), *QUESTION, 7], hints={"mode": "off"})
    assert stats.hits == REUSED
    assert stats.queries == len(SOURCE) + len(READER) + 46


# ---- prompts that come in pieces ----------------------------------------------------------------


def test_a_prompt_that_arrives_in_pieces_is_served_exactly(make_engine: Make) -> None:
    """vLLM takes tokens back when the next piece arrives."""
    engine = make_engine()
    engine.serve("source", SOURCE)
    engine.add("second", READER, resumable=True)
    while not engine.served["second"].outputs:
        engine.step()
    report = told(engine, "second")[0]
    assert (report["mode"], report["reused"]) == ("off", 0)
    assert report["declined"] == {"streaming_input": 1}
    assert [sequence.owner for sequence in engine.half.store.index._row_of] == ["source"]
