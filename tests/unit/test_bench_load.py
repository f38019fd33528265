# SPDX-License-Identifier: Apache-2.0
"""Tasks that arrive at random, whoever is still busy."""

from __future__ import annotations

import itertools
import statistics
import threading
from dataclasses import replace

import pytest

pytest.importorskip("openai", reason="the demo extra is not installed")

from bench_tasks import ScriptedDriver, relay

from kvcomm_vllm.cli.bench.driver import Place
from kvcomm_vllm.cli.bench.load import arrivals, run_load
from kvcomm_vllm.cli.bench.records import CallRecord, SkipRecord, TaskRecord
from kvcomm_vllm.cli.bench.runner import stopwatch
from kvcomm_vllm.cli.bench.task import Call, Task
from kvcomm_vllm.cli.client import RequestError


def place(task: Task) -> Place:
    return Place("work", "load", task.id)


def test_arrivals_are_a_poisson_process_of_the_seed() -> None:
    times = arrivals(5.0, 400.0, seed=1)
    assert times == arrivals(5.0, 400.0, seed=1)
    assert times != arrivals(5.0, 400.0, seed=2)
    assert times == sorted(times)
    assert times[-1] < 400.0
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.1)
    assert times[: len(arrivals(5.0, 10.0, 1))] == arrivals(5.0, 10.0, 1)


def test_a_task_does_not_wait_for_the_one_before_it() -> None:
    second = threading.Event()

    class Patient(ScriptedDriver):
        """The first task ends when the second one has been asked."""

        def ask(self, call: Call, index: int, place: Place) -> tuple[str, CallRecord]:
            if place.task == "b":
                second.set()
            elif not second.wait(60):
                raise RequestError("the second task did not start")
            said, record = super().ask(call, index, place)
            return said, replace(record, total_ms=1e12)

    tasks = [relay("a"), relay("b")]
    records = run_load(tasks, [0.0, 0.01], place, Patient("plain", []), stopwatch())
    assert [(record.task, type(record)) for record in records] == [
        (name, kind) for name in "ab" for kind in [CallRecord] * 3 + [TaskRecord]
    ]
    end = records[3]
    assert isinstance(end, TaskRecord)
    assert end.answer == "plain2"
    assert end.seconds < 1e9, "from its arrival to its end, not the sum of its calls"


def test_a_refused_task_is_skipped_and_the_others_go_on() -> None:
    class Refusing(ScriptedDriver):
        def ask(self, call: Call, index: int, place: Place) -> tuple[str, CallRecord]:
            self.refuse = 1 if place.task == "a" else -1
            return super().ask(call, index, place)

    tasks = [relay("a"), relay("b")]
    skip, *rest = run_load(tasks, [0.0, 0.05], place, Refusing("seam", []), stopwatch())
    assert isinstance(skip, SkipRecord)
    assert (skip.task, skip.columns) == ("a", ["seam"])
    assert [record.task for record in rest] == ["b"] * 4


def test_a_server_that_fails_ends_the_load() -> None:
    class Broken(ScriptedDriver):
        def ask(self, call: Call, index: int, place: Place) -> tuple[str, CallRecord]:
            raise RequestError("gone")

    with pytest.raises(RequestError, match="gone"):
        run_load([relay("a")], [0.0], place, Broken("seam", []), stopwatch())
