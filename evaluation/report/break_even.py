# SPDX-License-Identifier: Apache-2.0
"""From which shared length, and after how many calls, reuse pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kvcomm_vllm.evaluation.bench.columns import PLAIN
from kvcomm_vllm.evaluation.report.intervals import Floats, Interval, interval, unit_sums
from kvcomm_vllm.evaluation.report.numbers import Shown, count, fixed, tokens
from kvcomm_vllm.evaluation.report.run import Run, unit

FEWEST_CALLS = 4
NOTE = (
    "Straight lines through the calls after warm-up: time to first token by prompt length, and "
    "time saved against plain by reused tokens. Pays from: reused tokens where the second line "
    "crosses zero (– : it does not, or cannot be told; below the fewest measured it is a "
    "guess). Ahead from call: where the sum of all times, warm-up included, stays below "
    "plain's (– : not within this run)."
)
Point = tuple[object, float, float]  # unit, x, y


def break_even(run: Run, workload: str, column: str) -> Iterator[dict[str, Shown]]:
    """A column against plain, call by call; plain itself has but its line by prompt length."""
    calls = run.calls_of(workload, column)
    pairs = run.against(calls) if column != PLAIN else []
    if not calls or not (pairs or column == PLAIN):
        return
    prompts = [
        (n, call.prompt_tokens, call.ttft_ms) for n, call in enumerate(calls) if not call.warmup
    ]
    gains = [(call, other.ttft_ms - call.ttft_ms) for call, other in pairs]
    # warm-up is slow for reasons that have nothing to do with length
    saved = [(unit(call), call.reused or 0, gain) for call, gain in gains if not call.warmup]
    if all(call.reused is None for call, _ in gains if not call.warmup):
        saved = []
    line, cost = _line(saved), -sum(gain for call, gain in gains if call.warmup) / 1e3
    reused = [call.reused for call, _ in gains if call.reused]
    yield {
        "ms per 1,000 prompt tokens": _per_1000(_line(prompts)),
        "ms saved per 1,000 reused": _per_1000(line),
        "ms saved with 0 reused": fixed(line[0] if line else None, 1),
        "pays from, tokens [95%]": tokens(_pays_from(saved) if line else None),
        "fewest reused": count(min(reused, default=None)),
        "warm-up cost, s": fixed(cost if pairs else None, 2),
        "ahead from call": count(_ahead([gain for _, gain in gains])),
    }


def _per_1000(line: tuple[float, float] | None) -> Shown:
    return fixed(line[1] * 1e3 if line else None, 0)


def _ahead(gains: list[float]) -> int | None:
    """The first call from which the sum of all gains so far stays above zero."""
    behind = np.flatnonzero(np.cumsum(gains) <= 0)
    first = int(behind[-1]) + 2 if len(behind) else 1
    return first if first <= len(gains) else None


def _line(points: Sequence[Point]) -> tuple[float, float] | None:
    """Start and slope of the least-squares line; None if it cannot be told."""
    if len(points) < FEWEST_CALLS:
        return None
    start, slope = _fit(_moments(points).sum(axis=0))
    return (float(start), float(slope)) if np.isfinite(slope) else None


def _pays_from(points: Sequence[Point]) -> Interval | None:
    """Where the line rises above zero, 0 if it begins above; None where it never does. Its ``high``
    is None where some resamples never do.
    """
    return interval(lambda sums: _crossing(*_fit(sums)), _moments(points))


def _moments(points: Sequence[Point]) -> Floats:
    return unit_sums((of, (1.0, x, y, x * y, x * x)) for of, x, y in points)


def _fit(sums: Floats) -> tuple[Floats, Floats]:
    """Start and slope from sums of moments; NaN without a line."""
    count, x, y, xy, xx = np.moveaxis(sums, -1, 0)
    spread = count * xx - x * x
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(spread > 0, (count * xy - x * y) / spread, np.nan)
        return (y - slope * x) / count, slope


def _crossing(start: Floats, slope: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(slope > 0, np.maximum(0.0, -start / slope), np.inf)
    return np.asarray(np.where(start >= 0, 0.0, found))
