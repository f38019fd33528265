# SPDX-License-Identifier: Apache-2.0
"""Throughput and waiting times when tasks arrive whether or not others have ended."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from kvcomm_vllm.evaluation.bench.records import LOAD
from kvcomm_vllm.evaluation.report.numbers import Shown, count, fixed
from kvcomm_vllm.evaluation.report.run import Run
from kvcomm_vllm.evaluation.report.times import percentiles

NOTE = "Tasks arrive at random moments (Poisson), or all at once, whether or not others have ended."


def load(run: Run, workload: str, column: str) -> Iterator[dict[str, Shown]]:
    """A column, warm-up left out. The server keeps up as long as as many tasks end as arrive, from
    the first arrival to the last one or to the last end, sessions added up.
    """
    tasks = [task for task in run.tasks_of(workload, column, LOAD) if not task.warmup]
    calls = [call for call in run.calls_of(workload, column, LOAD) if not call.warmup]
    seconds = arriving = 0.0
    sessions = [list(found) for _, found in groupby(tasks, key=lambda task: task.session)]
    for found in sessions:
        first = min(task.at_s for task in found)
        seconds += max(task.at_s + task.seconds for task in found) - first
        arriving += max(task.at_s for task in found) - first
    if not calls or seconds <= 0:
        return
    between = len(tasks) - len(sessions)
    ms = [call.ttft_ms for call in calls]
    p50, p90 = np.percentile([task.seconds for task in tasks], (50, 90))
    yield {
        "tasks": count(len(tasks)),
        "arriving /s": fixed(between / arriving if arriving > 0 else None, 2),
        "ended /s": fixed(len(tasks) / seconds, 2),
        "output tokens /s": fixed(sum(call.output_tokens for call in calls) / seconds),
        **{f"TTFT {name}" if name == "p50 ms" else name: p for name, p in percentiles(ms).items()},
        "last ms": count(max(ms)),
        "task p50 s": fixed(float(p50)),
        "p90 s": fixed(float(p90)),
    }
