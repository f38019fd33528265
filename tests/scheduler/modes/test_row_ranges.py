# SPDX-License-Identifier: Apache-2.0
"""Arena rows are handed out once each, and all of them are there again when they are given back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.scheduler.modes.paper.row_ranges import RowRanges


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_no_row_has_two_owners_and_none_is_lost(script: list[tuple[bool, int]]) -> None:
    ranges = RowRanges(40)
    owned: list[tuple[int, int]] = []
    for take, number in script:
        if take:
            start = ranges.take(number)
            if start is not None:
                owned.append((start, number))
        elif owned:
            ranges.give(*owned.pop(number % len(owned)))
        rows = [row for start, count in owned for row in range(start, start + count)]
        assert len(rows) == len(set(rows))
        assert all(0 <= row < 40 for row in rows)
        assert ranges.free == 40 - len(rows)
    for start, count in owned:
        ranges.give(start, count)
    assert ranges.take(40) == 0


def test_a_range_is_found_wherever_it_fits() -> None:
    ranges = RowRanges(10)
    first, second, third = (ranges.take(3) for _ in range(3))
    assert (first, second, third) == (0, 3, 6)
    assert ranges.take(2) is None
    ranges.give(3, 3)
    assert ranges.take(2) == 3
    assert ranges.take(1) == 5
    assert ranges.take(1) == 9
    assert ranges.take(1) is None
