# SPDX-License-Identifier: Apache-2.0
"""Two servers with the same requests in turn: what one adds to the other's times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kvcomm_vllm.evaluation.report.intervals import Interval, ratio_of_sums


@dataclass(frozen=True)
class Added:
    """What is added.

    Args:
        middle: median of the paired differences.
        ratio: of all times, with its 95% interval.
    """

    middle: float
    ratio: Interval

    @property
    def share(self) -> str:
        return f"{self.ratio.value - 1:+.1%}"

    @property
    def between(self) -> str:
        """The 95% interval; empty where there are too few pairs for one."""
        low, high = self.ratio.low, self.ratio.high
        return "" if low is None or high is None else f"{low - 1:+.1%} to {high - 1:+.1%}"


def added_by(times: Sequence[float], before: Sequence[float], together: int) -> Added:
    """What ``times`` are above ``before``, request by request.

    Args:
        together: how many in a row are not independent of each other.
    """
    pairs = list(zip(times, before, strict=True))
    ratio = ratio_of_sums((number // together, *pair) for number, pair in enumerate(pairs))
    assert ratio is not None  # there are times
    return Added(statistics.median(a - b for a, b in pairs), ratio)
