# SPDX-License-Identifier: Apache-2.0
"""From which shared length, and after how many calls, reuse pays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvcomm_vllm.evaluation.bench.columns import PLAIN
from kvcomm_vllm.evaluation.bench.records import CallRecord
from kvcomm_vllm.evaluation.report.intervals import (
    FEWEST_UNITS,
    PERCENTILES,
    Floats,
    Interval,
    resample,
    unit_sums,
)
from kvcomm_vllm.evaluation.report.pairs import Pair, calls_of, pair_calls, unit
from kvcomm_vllm.evaluation.report.read import Run

FEWEST_CALLS = 4


@dataclass(frozen=True)
class Line:
    """Least squares: milliseconds to the first token = ``start`` + ``slope`` * tokens."""

    start: float
    slope: float


@dataclass(frozen=True)
class BreakEven:
    """A column on one workload (or on all of them) against plain, call by call.

    Args:
        by_prompt: the column's own times against prompt length, without warm-up; None if it cannot
            be told.
        saved: plain's time minus this column's on the same call, against reused tokens; ``start``
            is what a call costs that reuses nothing (negative: it is slower than plain).
        shared_tokens: reused tokens from which a call is faster than on plain: where ``saved``
            crosses zero, 0 if it begins above. None where it never crosses or cannot be told; its
            ``high`` is None where some resamples never cross.
        fewest_reused: the smallest number of reused tokens that was measured.
        warmup_cost_s: seconds by which warm-up calls were slower than plain's (negative: faster).
        calls_until_ahead: the first call, in their order and with warm-up, from which the sum of
            all times so far stays below plain's; None if it is not below at the end.
        calls: that were compared.
    """

    workload: str
    column: str
    by_prompt: Line | None
    saved: Line | None
    shared_tokens: Interval | None
    fewest_reused: int | None
    warmup_cost_s: float | None
    calls_until_ahead: int | None
    calls: int


def break_even(run: Run, workload: str, column: str) -> BreakEven | None:
    """None without a call that plain has served, too; plain itself has but its line."""
    calls = calls_of(run, workload, column)
    line = prompt_line([call for call in calls if not call.warmup])
    if column == PLAIN:
        return BreakEven(workload, column, line, None, None, None, None, None, len(calls))
    pairs = pair_calls(calls, calls_of(run, workload, PLAIN))
    if not pairs:
        return None
    gains = np.array([other.ttft_ms - call.ttft_ms for call, other in pairs])
    ahead = np.flatnonzero(gains.cumsum() <= 0)
    until = int(ahead[-1]) + 2 if len(ahead) else 1
    saved, shared = _shared(pairs)
    reused = [call.reused for call, _ in pairs if call.reused]
    warm = [other.ttft_ms - call.ttft_ms for call, other in pairs if call.warmup]
    return BreakEven(
        workload,
        column,
        by_prompt=line,
        saved=saved,
        shared_tokens=shared,
        fewest_reused=min(reused, default=None),
        warmup_cost_s=-sum(warm) / 1e3,
        calls_until_ahead=until if until <= len(pairs) else None,
        calls=len(pairs),
    )


def prompt_line(calls: list[CallRecord]) -> Line | None:
    """Times to first token against prompt length; None if it cannot be told."""
    rows = unit_sums(
        (number, _moments(call.prompt_tokens, call.ttft_ms)) for number, call in enumerate(calls)
    )
    start, slope = _fit(rows.sum(axis=0)) if len(calls) >= FEWEST_CALLS else (np.nan, np.nan)
    return Line(float(start), float(slope)) if np.isfinite(slope) else None


def _shared(pairs: list[Pair]) -> tuple[Line | None, Interval | None]:
    """Warm-up is left out: it is slow for reasons that have nothing to do with length."""
    warmed = [(call, other) for call, other in pairs if not call.warmup]
    rows = unit_sums(
        (unit(call), _moments(call.reused or 0, other.ttft_ms - call.ttft_ms))
        for call, other in warmed
    )
    if len(warmed) < FEWEST_CALLS or all(call.reused is None for call, _ in warmed):
        return None, None
    start, slope = _fit(rows.sum(axis=0))
    if not np.isfinite(slope):
        return None, None
    line = Line(float(start), float(slope))
    value = float(_crossing(start, slope))
    if not np.isfinite(value):
        return line, None
    if len(rows) < FEWEST_UNITS:
        return line, Interval(value, None, None, len(rows))
    drawn = _crossing(*_fit(resample(len(rows)) @ rows))
    low, high = np.percentile(drawn, PERCENTILES, method="nearest")
    return line, Interval(value, _finite(low), _finite(high), len(rows))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _moments(x: float, y: float) -> tuple[float, ...]:
    return 1.0, x, y, x * y, x * x


def _fit(sums: Floats) -> tuple[Floats, Floats]:
    """Start and slope of the least-squares line from sums of :func:`_moments`; NaN without one."""
    count, x, y, xy, xx = np.moveaxis(sums, -1, 0)
    spread = count * xx - x * x
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(spread > 0, (count * xy - x * y) / spread, np.nan)
        return (y - slope * x) / count, slope


def _crossing(start: Floats, slope: Floats) -> Floats:
    """Where a line rises above zero, from 0 on; infinite where it does not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(slope > 0, np.maximum(0.0, -start / slope), np.inf)
    return np.asarray(np.where(start >= 0, 0.0, found))
