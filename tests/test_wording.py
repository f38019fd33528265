# SPDX-License-Identifier: Apache-2.0
"""Promises of how foreign values are shown: as Python writes them, but never long, never more than
a line, and never an error.
"""

from __future__ import annotations

import pytest
from any_values import HUGE, LONG, is_short_line, nested, python_values
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm_vllm.wording import MAX_SHOWN, one_line, shown


@pytest.mark.parametrize(
    "value", [None, True, -5, 0.25, 1e400, "it's", "a\nb", b"\0", [], [1, "a"], {"a": [1]}, {}]
)
def test_small_values_are_shown_as_python_writes_them(value: object) -> None:
    assert shown(value) == repr(value)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (HUGE, "<number of about 5001 digits>"),
        (-HUGE, "<number of about 5001 digits>"),
        (10**39, "1" + "0" * 39),
        (LONG, repr(LONG[:40]) + "..."),
        ([1, 2, 3, 4, 5], "[1, 2, 3, 4, ...]"),
        ((1, HUGE), "[1, <number of about 5001 digits>]"),
        (nested(100_000), "[[[...]]]"),
        (
            {HUGE: LONG},
            "{<number of about 5001 digits>: 'longlonglonglonglonglonglonglonglonglong'...}",
        ),
        (object(), "<object>"),
    ],
    ids=[str(number) for number in range(9)],
)
def test_what_would_be_long_is_shortened(value: object, wanted: str) -> None:
    assert shown(value) == wanted


@settings(deadline=None)
@given(python_values)
def test_every_value_is_shown_on_one_short_line(value: object) -> None:
    assert is_short_line(shown(value), MAX_SHOWN)


@settings(deadline=None)
@given(st.text(), st.integers(1, 5000))
def test_any_text_becomes_one_short_line(text: str, times: int) -> None:
    line = one_line(text * times)
    assert is_short_line(line, 200)
    assert line
    assert one_line(line) == line


def test_a_text_that_is_one_short_line_is_left_alone() -> None:
    assert one_line("/home/me/größte datei.yaml") == "/home/me/größte datei.yaml"
