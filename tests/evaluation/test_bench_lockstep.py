# SPDX-License-Identifier: Apache-2.0
"""One task on several columns: who is asked when, and what is kept."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("openai", reason="the bench extra is not installed")

from bench_tasks import ScriptedDriver, relay

from kvcomm_vllm.evaluation.bench.lockstep import Floor, Rest, Running, play, run_task
from kvcomm_vllm.evaluation.bench.records import CallRecord, Record, SkipRecord, Stand, TaskRecord

STAND = Stand("work", "lockstep", "t")
FLOOR = Floor(Rest(0.0), lambda: 5.0)
NAMES = ("plain", "seam", "anchor")


def run(side_by_side: bool, refuse: int = -1) -> tuple[list[Record], list[ScriptedDriver]]:
    log: list[tuple[str, int]] = []
    drivers = [
        ScriptedDriver("plain", log),
        ScriptedDriver("seam", log, refuse),
        ScriptedDriver("anchor", log),
    ]
    records = run_task(relay("t"), STAND, drivers, FLOOR, side_by_side=side_by_side)
    return records, drivers


def test_a_call_goes_to_every_column_before_the_next_one_does() -> None:
    records, drivers = run(side_by_side=True)
    plain, seam, anchor = NAMES
    assert drivers[0].log == [
        *[(plain, 0), (seam, 0), (anchor, 0)],
        *[(anchor, 1), (seam, 1), (plain, 1)],
        *[(plain, 2), (seam, 2), (anchor, 2)],
    ]
    calls = [record for record in records if isinstance(record, CallRecord)]
    assert [(record.column, record.index) for record in calls] == drivers[0].log


def test_one_after_the_other_a_column_is_done_before_the_next_begins() -> None:
    _, drivers = run(side_by_side=False)
    assert drivers[0].log == [(name, index) for name in NAMES for index in range(3)]


@pytest.mark.parametrize("side_by_side", [True, False])
def test_each_column_quotes_its_own_answers(side_by_side: bool) -> None:
    records, drivers = run(side_by_side)
    for driver in drivers:
        name = driver.column.name
        assert driver.asked == [
            "t agent 0",
            f"t agent 1 {name}0",
            f"t agent 2 {name}0 {name}1",
        ]
    ends = [record for record in records if isinstance(record, TaskRecord)]
    assert [(end.column, end.answer) for end in ends] == [(name, f"{name}2") for name in NAMES]
    assert [end.seconds for end in ends] == [6.0] * 3
    assert [end.score for end in ends] == [float(len(end.answer)) for end in ends]
    assert {(end.group, end.choice, end.at_s) for end in ends} == {("g", None, 5.0)}


def test_with_a_lead_all_columns_are_given_its_answers_to_quote() -> None:
    drivers = [ScriptedDriver("anchor", []), ScriptedDriver("plain", [])]
    rounds: list[list[str]] = []
    floor = Floor(
        Rest(0.0),
        lambda: 5.0,
        heard=lambda turn: rounds.append([one.texts[-1] for one in turn]),
    )
    played = play(relay("t"), STAND, drivers, floor, lead="anchor")
    assert drivers[0].asked == drivers[1].asked
    assert drivers[1].asked[2] == "t agent 2 anchor0 anchor1"
    assert rounds == [[f"anchor{n}", f"plain{n}"] for n in range(3)]
    assert isinstance(played, list)
    assert all(isinstance(one, Running) and len(one.records) == 3 for one in played)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_a_refused_request_costs_the_task_on_all_columns(side_by_side: bool) -> None:
    records, _ = run(side_by_side, refuse=1)
    (skip,) = records
    assert isinstance(skip, SkipRecord)
    assert (skip.column, skip.columns, skip.error) == ("seam", list(NAMES), "too long")


def test_a_server_is_asked_only_when_the_last_one_asked_is_at_rest() -> None:
    rest = Rest(3600.0)
    rest.before()  # nobody was asked: does not take an hour
    rest.seconds = 0.05
    rest.after()
    began = time.monotonic()
    rest.before()
    assert time.monotonic() - began >= 0.04
