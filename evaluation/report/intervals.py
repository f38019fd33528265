# SPDX-License-Identifier: Apache-2.0
"""Bootstrap confidence intervals over whole tasks, seeded: equal records, equal intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def unit_sums(rows: Iterable[tuple[object, tuple[float, ...]]]) -> Floats:
    """Sums of the values of each unit: (units, values), units in the order of appearance.

    Calls of one task are not independent of each other, so they are drawn together.
    """
    sums: dict[object, Floats] = {}
    for unit, values in rows:
        sums[unit] = sums.get(unit, np.zeros(len(values))) + np.asarray(values, dtype=np.float64)
    return np.stack(list(sums.values())) if sums else np.zeros((0, 0))


def interval(statistic: Callable[..., Floats], *samples: Floats) -> Interval | None:
    """A statistic of sums over units, from samples that are drawn independently of each other.

    Args:
        statistic: of the sums over a sample's units, one argument per sample, ``[..., values]``
            each; infinite or NaN where it has no value.
        samples: (units, values) each, see :func:`unit_sums`.

    Returns None where the statistic has no value; its ends are None where they have none.
    """
    value = float(statistic(*(sums.sum(axis=0) for sums in samples)))
    units = sum(map(len, samples))
    if not np.isfinite(value):
        return None
    if min(map(len, samples)) < FEWEST_UNITS:
        return Interval(value, None, None, units)
    drawn = statistic(*(_resample(len(sums), n) @ sums for n, sums in enumerate(samples)))
    with np.errstate(invalid="ignore"):  # between two infinite ones there is nothing
        low, high = np.nanpercentile(drawn, PERCENTILES)
    return Interval(value, _finite(low), _finite(high), units)


def _resample(units: int, sample: int) -> Floats:
    """How often each of ``units`` is drawn in each resample: (RESAMPLES, units)."""
    rng = np.random.default_rng((SEED, sample))
    return rng.multinomial(units, np.full(units, 1 / units), size=RESAMPLES).astype(np.float64)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def ratio_of_sums(rows: Iterable[tuple[object, float, float]]) -> Interval | None:
    """Sum of the first values over the sum of the second ones.

    Args:
        rows: (unit, numerator, denominator), e.g. a task and the times of one of its calls.

    Returns None without rows, or where the denominators add up to nothing.
    """
    sums = unit_sums((unit, (above, below)) for unit, above, below in rows)
    return interval(_ratio, sums) if len(sums) else None


def _ratio(sums: Floats) -> Floats:
    above, below = sums[..., 0], sums[..., 1]
    return np.divide(above, below, out=np.full_like(below, np.nan), where=below > 0)


def mean_of(rows: Iterable[tuple[object, float]]) -> Interval | None:
    """Mean of the values, e.g. of paired differences of scores. None without rows."""
    return ratio_of_sums((unit, value, 1.0) for unit, value in rows)
