# SPDX-License-Identifier: Apache-2.0
"""Model runner V2 calls the connector in its own order; with steps in flight, as it has them, a
request gets the same as ever, and a load that fails ends none.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle, check_report
from engine_without_worker import EngineWithoutWorker
from runner_v2 import call_as_runner_v2
from scripts import words

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
READER = [*words("two", 9), *QUESTION, *words("tail", 7)]
OTHER = [*words("three", 14), *QUESTION, 3]
LARGE = [*words("instructions", 150), *QUESTION, *words("tail", 7)]


@pytest.fixture
def engine(make_engine: Make) -> EngineWithoutWorker:
    engine = make_engine(num_blocks=256, budget=64, pipeline=2, share_inflight_seconds=0)
    engine.serve("source", [*words("one", 20), *QUESTION])
    return engine


def test_its_calls_load_before_the_forward_and_report_after_it(
    engine: EngineWithoutWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_as_runner_v2(engine, monkeypatch)
    engine.add("second", READER, words("answer", 6))
    engine.add("third", OTHER, words("other", 6))
    engine.run()
    for name in ("second", "third"):
        assert engine.served[name].report["reused"] == 38
        check_report(engine, name)
    check_idle(engine)


def test_a_request_waits_for_pieces_and_is_woken(
    engine: EngineWithoutWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in steps that have no forward."""
    call_as_runner_v2(engine, monkeypatch)
    large = engine.serve("large", LARGE, words("answer", 5))
    assert len(large.loaded) > 2
    check_report(engine, "large")
    check_idle(engine)


@pytest.mark.parametrize("prompt", [READER, LARGE], ids=["one step", "many pieces"])
def test_a_load_that_fails_is_repaired(
    engine: EngineWithoutWorker, monkeypatch: pytest.MonkeyPatch, prompt: list[int]
) -> None:
    half = call_as_runner_v2(engine, monkeypatch)
    half.broken = {"second"}
    engine.add("second", prompt, words("answer", 6))
    engine.add("third", OTHER)
    engine.run()
    assert engine.served["second"].declined == ["load_repaired"]
    assert len(engine.served["second"].outputs) == 6
    assert engine.served["third"].report["reused"] == 38
    check_idle(engine)


def test_a_side_forward_that_fails_is_repaired(
    engine: EngineWithoutWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = call_as_runner_v2(engine, monkeypatch)
    half.failures = 1
    assert engine.serve("second", READER, words("answer", 6)).declined == ["load_repaired"]
    check_idle(engine)


def test_only_where_the_repair_fails_as_well_the_request_ends_with_an_error(
    engine: EngineWithoutWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = call_as_runner_v2(engine, monkeypatch)
    half.failures = 2
    second = engine.serve("second", READER, [1])  # no step in flight reads what is not there
    assert str(second.outputs[-1].finish_reason) == "error"
    assert engine.serve("third", OTHER).report["reused"] == 38
    check_idle(engine)
