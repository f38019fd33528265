# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals: right where theory knows them, and never too narrow by double counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm_vllm.evaluation.report.intervals import FEWEST_UNITS, Interval, mean_of, ratio_of_sums
from kvcomm_vllm.evaluation.report.numbers import between, count, points, share, times, tokens

PAIRS = st.lists(st.tuples(st.floats(1, 1000), st.floats(1, 1000)), min_size=5, max_size=20)


@settings(max_examples=25, deadline=None)
@given(PAIRS)
def test_ratio_is_that_of_sums_and_lies_within_its_interval(
    pairs: list[tuple[float, float]],
) -> None:
    rows = [(number, above, below) for number, (above, below) in enumerate(pairs)]
    found = ratio_of_sums(rows)
    assert found is not None
    assert found.value == pytest.approx(sum(a for a, _ in pairs) / sum(b for _, b in pairs))
    ratios = [above / below for above, below in pairs]
    assert found.low is not None
    assert found.high is not None
    assert min(ratios) * 0.999 <= found.low <= found.high <= max(ratios) * 1.001
    assert ratio_of_sums(rows) == found, "equal records must give equal intervals"


def test_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, 400)
    found = mean_of(enumerate(values))
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_more_calls_of_the_same_tasks_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(2).uniform(1, 5, 12)
    once = ratio_of_sums((task, value, 1.0) for task, value in enumerate(values))
    often = ratio_of_sums((task, value, 1.0) for task, value in enumerate(values) for _ in range(9))
    assert once is not None
    assert often is not None
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert often.units == 12


def test_few_tasks_get_no_interval_and_nothing_gets_no_value() -> None:
    few = mean_of([(task, 1.0) for task in range(FEWEST_UNITS - 1)])
    assert few == Interval(1.0, None, None, FEWEST_UNITS - 1)
    assert mean_of([]) is None
    assert ratio_of_sums([("task", 1.0, 0.0)]) is None


def test_numbers_are_shown_with_their_interval_or_a_dash() -> None:
    assert times(Interval(4.514, 4.1, 4.93, 9)) == "4.51× [4.10, 4.93]"
    assert times(Interval(24.51, None, None, 1)) == "24.5×"
    assert points(Interval(-0.012, -0.04, 0.015, 9)) == "−1.2 [−4.0, +1.5]"
    assert tokens(Interval(120.4, 80.0, None, 9)) == "120 [80, ∞]"
    assert between(Interval(-0.5, -0.75, 0.25, 9), 0, scale=100) == " (95% interval −75 to 25)"
    assert between(Interval(0.5, None, None, 1), 0) == ""
    assert (count(-1234.4), share(0.0312)) == ("−1,234", "3.1%")
    assert {times(None), points(None), tokens(None), count(None), share(None)} == {"–"}
