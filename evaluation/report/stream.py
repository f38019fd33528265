# SPDX-License-Identifier: Apache-2.0
"""Whether the saving lasts over a long row of tasks that share nothing but their agents."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from statistics import median

import numpy as np

from kvcomm_vllm.evaluation.bench.columns import PLAIN
from kvcomm_vllm.evaluation.bench.records import STREAM
from kvcomm_vllm.evaluation.report.intervals import Floats, Interval, interval, unit_sums
from kvcomm_vllm.evaluation.report.numbers import Shown, fixed, share, times
from kvcomm_vllm.evaluation.report.run import Pair, Run, unit

WINDOW = 100
NOTE = (
    "Novel tasks one after the other, after warm-up. Sum of a task's times to first token, "
    "mean over the window; typical: the saving by medians of each of a task's calls; reused: "
    "tokens a task; last line: saving of the last window over that of the first one."
)
Tasks = list[list[Pair]]


def stream(run: Run, workload: str, column: str) -> Iterator[dict[str, Shown]]:
    """A column against plain in windows of tasks, thirds of a stream that is shorter than two of
    them. A rest that fills no window belongs to the last one.
    """
    calls = [call for call in run.calls_of(workload, column, STREAM) if not call.warmup]
    pairs = [] if column == PLAIN else run.against(calls, PLAIN, STREAM)
    tasks = [list(found) for _, found in groupby(pairs, key=lambda pair: unit(pair[0]))]
    if not tasks:
        return
    size = WINDOW if len(tasks) >= 2 * WINDOW else max(1, len(tasks) // 3)
    starts = list(range(0, len(tasks) - size + 1, size))
    ends = [*starts[1:], len(tasks)]
    lasting = _lasting(tasks[: ends[0]], tasks[-size:]) if len(starts) > 1 else None
    for start, end in zip(starts, ends, strict=True):
        yield {
            "tasks": Shown(f"{start + 1}-{end}", [start + 1, end]),
            **_window(tasks[start:end]),
            "last / first [95%]": times(lasting) if end == len(tasks) else Shown(""),
        }


def _window(tasks: Tasks) -> dict[str, Shown]:
    ours, plain = _sums(tasks).sum(axis=0)
    pairs = [pair for task in tasks for pair in task]
    reused = [call.reused for call, _ in pairs if call.reused is not None]
    return {
        "plain ms": fixed(float(plain / len(tasks)), 0),
        "ms": fixed(float(ours / len(tasks)), 0),
        "saved": share(float(1 - ours / plain)),
        "typical": share(_typical(pairs)),
        "reused": fixed(sum(reused) / len(tasks) if reused else None),
    }


def _typical(pairs: list[Pair]) -> float:
    """The saving by medians of each of a task's calls: single late calls do not count."""
    calls: dict[int, list[Pair]] = {}
    for pair in pairs:
        calls.setdefault(pair[0].index, []).append(pair)
    ours, plain = (
        sum(median(pair[side].ttft_ms for pair in group) for group in calls.values())
        for side in (0, 1)
    )
    return 1 - ours / plain


def _lasting(first: Tasks, last: Tasks) -> Interval | None:
    """Saving of the last window over that of the first one, if there was any."""

    def saving(sums: Floats) -> Floats:
        return np.asarray(1 - sums[..., 0] / sums[..., 1])

    if saving(_sums(first).sum(axis=0)) <= 0:
        return None
    samples = (_sums(first), _sums(last))
    return interval(lambda before, after: saving(after) / saving(before), *samples)


def _sums(tasks: Tasks) -> Floats:
    """A task's times to first token, on the column and on plain."""
    return unit_sums((n, (c.ttft_ms, o.ttft_ms)) for n, task in enumerate(tasks) for c, o in task)
