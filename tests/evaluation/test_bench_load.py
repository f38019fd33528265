# SPDX-License-Identifier: Apache-2.0
"""Tasks that arrive at random, whoever is still busy."""

from __future__ import annotations

import itertools
import statistics
import threading
from dataclasses import replace

import pytest

pytest.importorskip("openai", reason="the bench extra is not installed")

from bench_tasks import ScriptedDriver, relay

from kvcomm_vllm.evaluation.bench.load import arrivals, run_load
from kvcomm_vllm.evaluation.bench.lockstep import Floor, Rest
from kvcomm_vllm.evaluation.bench.records import CallRecord, SkipRecord, Stand, TaskRecord
from kvcomm_vllm.evaluation.bench.runner import stopwatch
from kvcomm_vllm.evaluation.serving.client import RequestError
from kvcomm_vllm.evaluation.workloads.task import Call

STAND = Stand("work", "load", "any")


def floor() -> Floor:
    return Floor(Rest(0.0), stopwatch())


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

        def ask(self, call: Call, index: int, stand: Stand) -> tuple[str, CallRecord]:
            if stand.task == "b":
                second.set()
            elif not second.wait(60):
                raise RequestError("the second task did not start")
            said, record = super().ask(call, index, stand)
            return said, replace(record, total_ms=1e12)

    tasks = [relay("a"), relay("b")]
    records = run_load(tasks, [0.0, 0.01], STAND, Patient("plain", []), floor())
    assert [(record.task, type(record)) for record in records] == [
        (name, kind) for name in "ab" for kind in [CallRecord] * 3 + [TaskRecord]
    ]
    end = records[3]
    assert isinstance(end, TaskRecord)
    assert end.answer == "plain2"
    assert end.seconds < 1e9, "from its arrival to its end, not the sum of its calls"


def test_a_refused_task_is_skipped_and_the_others_go_on() -> None:
    class Refusing(ScriptedDriver):
        def ask(self, call: Call, index: int, stand: Stand) -> tuple[str, CallRecord]:
            self.refuse = 1 if stand.task == "a" else -1
            return super().ask(call, index, stand)

    tasks = [relay("a"), relay("b")]
    skip, *rest = run_load(tasks, [0.0, 0.05], STAND, Refusing("seam", []), floor())
    assert isinstance(skip, SkipRecord)
    assert (skip.task, skip.columns) == ("a", ["seam"])
    assert [record.task for record in rest] == ["b"] * 4


def test_a_server_that_fails_ends_the_load() -> None:
    class Broken(ScriptedDriver):
        def ask(self, call: Call, index: int, stand: Stand) -> tuple[str, CallRecord]:
            raise RequestError("gone")

    with pytest.raises(RequestError, match="gone"):
        run_load([relay("a")], [0.0], STAND, Broken("seam", []), floor())


def test_what_servers_are_to_have_seen_is_sent_before_the_first_task_starts() -> None:
    log: list[str] = []

    class Primed(ScriptedDriver):
        def prime(self, call: Call) -> int:
            log.append(f"prime {call.messages[0]['content']}")
            return 1

        def ask(self, call: Call, index: int, stand: Stand) -> tuple[str, CallRecord]:
            log.append(f"ask {stand.task}")
            return super().ask(call, index, stand)

    tasks = [relay("a", agents=1), relay("b", agents=1)]
    run_load(tasks, [0.0, 0.0], STAND, Primed("seam", []), floor())
    assert log[:2] == ["prime a agent 0", "prime b agent 0"]
    assert sorted(log[2:]) == ["ask a", "ask b"]
