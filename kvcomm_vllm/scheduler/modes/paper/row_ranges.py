# SPDX-License-Identifier: Apache-2.0
"""Rows of an arena, handed out in contiguous ranges."""

from __future__ import annotations

import bisect


class RowRanges:
    """First fit; neighbouring free ranges become one again.

    Args:
        rows: how many there are.
    """

    def __init__(self, rows: int) -> None:
        self._free = [(0, rows)] if rows else []  # (start, end), in order

    @property
    def free(self) -> int:
        return sum(end - start for start, end in self._free)

    def take(self, count: int) -> int | None:
        """Start of ``count`` rows that nobody else has; None if no free range is as long."""
        for place, (start, end) in enumerate(self._free):
            if end - start >= count:
                left = [(start + count, end)] if start + count < end else []
                self._free[place : place + 1] = left
                return start
        return None

    def give(self, start: int, count: int) -> None:
        """Take back what :meth:`take` handed out."""
        if not count:
            return
        end = start + count
        place = bisect.bisect_left(self._free, (start, end))
        first = last = place
        if place and self._free[place - 1][1] == start:
            first, start = place - 1, self._free[place - 1][0]
        if place < len(self._free) and self._free[place][0] == end:
            last, end = place + 1, self._free[place][1]
        self._free[first:last] = [(start, end)]
