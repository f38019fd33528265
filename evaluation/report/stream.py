# SPDX-License-Identifier: Apache-2.0
"""Whether the saving lasts over a long row of tasks that share nothing but their agents."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np

from kvcomm_vllm.evaluation.bench.columns import PLAIN
from kvcomm_vllm.evaluation.bench.records import STREAM, CallRecord
from kvcomm_vllm.evaluation.report.intervals import (
    FEWEST_UNITS,
    PERCENTILES,
    Floats,
    Interval,
    resample,
    unit_sums,
)
from kvcomm_vllm.evaluation.report.pairs import calls_of, pair_calls, unit
from kvcomm_vllm.evaluation.report.read import Run

Pair = tuple[CallRecord, CallRecord]  # of the column, of plain
WINDOW = 100
FEWEST_WINDOWS = 2


@dataclass(frozen=True)
class Window:
    """Consecutive tasks of a stream, numbered from 1 after warm-up.

    Args:
        saving: share of plain's times to first token that was saved, over all calls.
        typical: the same of the medians of each of a task's calls: single late calls do not count.
        plain_ms, ttft_ms: mean over its tasks of the sum over a task's calls.
        reused: tokens per task; None where the server does not count them.
    """

    first: int
    last: int
    saving: float
    typical: float
    plain_ms: float
    ttft_ms: float
    reused: float | None


@dataclass(frozen=True)
class Stream:
    """A column on one workload in phase stream, against plain.

    Args:
        tasks: after warm-up.
        windows: of :data:`WINDOW` tasks; thirds of a stream that is shorter than two of them. A
            rest that fills no window belongs to the last one.
        lasting: saving of the last window over that of the first one.
    """

    workload: str
    column: str
    tasks: int
    windows: list[Window]
    lasting: Interval | None


def stream(run: Run, workload: str, column: str) -> Stream | None:
    """None without tasks after warm-up that both columns have served."""
    calls = calls_of(run, workload, column, STREAM)
    pairs = [
        pair
        for pair in pair_calls(calls, calls_of(run, workload, PLAIN, STREAM))
        if not pair[0].warmup
    ]
    sums = unit_sums((unit(call), (call.ttft_ms, other.ttft_ms)) for call, other in pairs)
    if column == PLAIN or not len(sums):
        return None
    size = WINDOW if len(sums) >= FEWEST_WINDOWS * WINDOW else max(1, len(sums) // 3)
    starts = range(0, max(1, len(sums) - size + 1), size)
    ends = [*starts[1:], len(sums)]
    tasks: dict[object, list[Pair]] = {}
    for pair in pairs:
        tasks.setdefault(unit(pair[0]), []).append(pair)
    rows = list(tasks.values())  # in the order of sums
    windows = [
        _window(start + 1, sums[start:end], rows[start:end])
        for start, end in zip(starts, ends, strict=True)
    ]
    first, last = sums[: ends[0]], sums[-size:]
    return Stream(
        workload,
        column,
        len(sums),
        windows,
        _lasting(first, last) if len(windows) >= FEWEST_WINDOWS else None,
    )


def _window(first: int, sums: Floats, rows: list[list[Pair]]) -> Window:
    ours, plain = sums.sum(axis=0)
    tasks, pairs = len(rows), [pair for row in rows for pair in row]
    reused = [call.reused for call, _ in pairs if call.reused is not None]
    return Window(
        first,
        first + tasks - 1,
        saving=float(1 - ours / plain),
        typical=_typical(pairs),
        plain_ms=float(plain / tasks),
        ttft_ms=float(ours / tasks),
        reused=sum(reused) / tasks if reused else None,
    )


def _typical(pairs: list[Pair]) -> float:
    calls: dict[int, list[Pair]] = {}
    for pair in pairs:
        calls.setdefault(pair[0].index, []).append(pair)
    ours, plain = (
        sum(median(pair[side].ttft_ms for pair in group) for group in calls.values())
        for side in (0, 1)
    )
    return 1 - ours / plain


def _lasting(first: Floats, last: Floats) -> Interval | None:
    def saving(sums: Floats) -> Floats:
        return np.asarray(1 - sums[..., 0] / sums[..., 1])

    before, after = saving(first.sum(axis=0)), saving(last.sum(axis=0))
    if before <= 0:
        return None
    value = float(after / before)
    if min(len(first), len(last)) < FEWEST_UNITS:
        return Interval(value, None, None, len(first) + len(last))
    drawn = saving(resample(len(last), 1) @ last) / saving(resample(len(first)) @ first)
    low, high = np.percentile(drawn, PERCENTILES)
    return Interval(value, float(low), float(high), len(first) + len(last))
