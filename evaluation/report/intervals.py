# SPDX-License-Identifier: Apache-2.0
"""Bootstrap confidence intervals over whole tasks, seeded: equal records, equal intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 5000
SEED = 0
FEWEST_UNITS = 5  # an interval from fewer would say nothing
PERCENTILES = (2.5, 97.5)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; ``low`` and ``high`` are None where there is no interval.

    Args:
        units: what was drawn anew in each resample: tasks, or groups of tasks that belong together.
    """

    value: float
    low: float | None
    high: float | None
    units: int


def resample(units: int, stream: int = 0) -> Floats:
    """How often each of ``units`` is drawn in each resample: (RESAMPLES, units).

    Another ``stream`` draws independently of this one.
    """
    rng = np.random.default_rng((SEED, stream))
    return rng.multinomial(units, np.full(units, 1 / units), size=RESAMPLES).astype(np.float64)


def unit_sums(rows: Iterable[tuple[object, tuple[float, ...]]]) -> Floats:
    """Sums of the values of each unit: (units, values), units in the order of appearance.

    Calls of one task are not independent of each other, so they are drawn together.
    """
    sums: dict[object, Floats] = {}
    for unit, values in rows:
        sums[unit] = sums.get(unit, np.zeros(len(values))) + np.asarray(values, dtype=np.float64)
    return np.stack(list(sums.values())) if sums else np.zeros((0, 0))


def ratio_of_sums(rows: Iterable[tuple[object, float, float]]) -> Interval | None:
    """Sum of the first values over the sum of the second ones.

    Args:
        rows: (unit, numerator, denominator), e.g. a task and the times of one of its calls.

    Returns None without rows, or where the denominators add up to nothing.
    """
    sums = unit_sums((unit, (above, below)) for unit, above, below in rows)
    if not len(sums) or sums[:, 1].sum() <= 0:
        return None
    value = float(sums[:, 0].sum() / sums[:, 1].sum())
    if len(sums) < FEWEST_UNITS:
        return Interval(value, None, None, len(sums))
    drawn = resample(len(sums)) @ sums
    good = drawn[:, 1] > 0
    low, high = np.percentile(drawn[good, 0] / drawn[good, 1], PERCENTILES)
    return Interval(value, float(low), float(high), len(sums))


def mean_of(rows: Iterable[tuple[object, float]]) -> Interval | None:
    """Mean of the values, e.g. of paired differences of scores. None without rows."""
    return ratio_of_sums((unit, value, 1.0) for unit, value in rows)
