# SPDX-License-Identifier: Apache-2.0
"""Throughput and waiting times when tasks arrive whether or not others have ended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvcomm_vllm.evaluation.bench.records import LOAD, TaskRecord
from kvcomm_vllm.evaluation.report.latency import percentiles
from kvcomm_vllm.evaluation.report.pairs import calls_of, tasks_of
from kvcomm_vllm.evaluation.report.read import Run


@dataclass(frozen=True)
class Load:
    """A column on one workload in phase load, warm-up left out.

    Args:
        seconds: from the first arrival to the end of the last task (summed over sessions).
        arrivals_per_s, tasks_per_s, tokens_per_s: tasks that arrived between the first and the
            last arrival, tasks that ended, and tokens that were written, per second. The server
            keeps up as long as the first two are about equal.
        p50, p90, p99: time to first token, ms; ``most``: of the last one.
        task_p50, task_p90: from a task's arrival to its end, seconds.
    """

    workload: str
    column: str
    tasks: int
    seconds: float
    arrivals_per_s: float | None
    tasks_per_s: float
    tokens_per_s: float
    p50: float
    p90: float
    p99: float
    most: float
    task_p50: float
    task_p90: float


def load(run: Run, workload: str, column: str) -> Load | None:
    """None without a task, or where no time went by."""
    tasks = [task for task in tasks_of(run, workload, column, LOAD) if not task.warmup]
    calls = [call for call in calls_of(run, workload, column, LOAD) if not call.warmup]
    sessions: dict[int, list[TaskRecord]] = {}
    for task in tasks:
        sessions.setdefault(task.session, []).append(task)
    seconds = sum(
        max(task.at_s + task.seconds for task in found) - min(task.at_s for task in found)
        for found in sessions.values()
    )
    if not calls or seconds <= 0:
        return None
    arriving = sum(
        max(task.at_s for task in found) - min(task.at_s for task in found)
        for found in sessions.values()
    )
    between = len(tasks) - len(sessions)
    first = [call.ttft_ms for call in calls]
    task_p50, task_p90 = np.percentile([task.seconds for task in tasks], (50, 90))
    return Load(
        workload,
        column,
        len(tasks),
        seconds,
        between / arriving if arriving > 0 else None,
        len(tasks) / seconds,
        sum(call.output_tokens for call in calls) / seconds,
        *percentiles(first),
        max(first),
        float(task_p50),
        float(task_p90),
    )
