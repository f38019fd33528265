# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them; a dash where there is none."""

from __future__ import annotations

from kvcomm_vllm.evaluation.report.intervals import Interval

NONE = "–"
MINUS = "−"


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    return NONE if value is None else f"{value:,.0f}".replace("-", MINUS)


def fixed(value: float | None, digits: int = 1) -> str:
    """A number with so many decimals."""
    return NONE if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def share(value: float | None) -> str:
    """A share in 0..1 as a percentage."""
    return NONE if value is None else f"{value:.1%}".replace("-", MINUS)


def times(value: Interval | None) -> str:
    """A ratio with its interval: 4.51× [4.10, 4.93]."""
    if value is None:
        return NONE
    digits = 2 if value.value < 10 else 1
    return f"{value.value:.{digits}f}×{_ends(value, 1.0, digits, '')}"


def points(value: Interval | None) -> str:
    """A difference of shares in percentage points, with its interval: −1.2 [−4.0, +1.5]."""
    if value is None:
        return NONE
    return f"{100 * value.value:+.1f}".replace("-", MINUS) + _ends(value, 100.0, 1, "+")


def between(value: Interval, digits: int, scale: float = 1.0) -> str:
    """An interval in words, in brackets; nothing where there is none."""
    if value.low is None or value.high is None:
        return ""
    ends = (fixed(scale * end, digits) for end in (value.low, value.high))
    return f" (95% interval {' to '.join(ends)})"


def _ends(value: Interval, scale: float, digits: int, sign: str) -> str:
    if value.low is None:
        return ""
    low = f"{scale * value.low:{sign}.{digits}f}"
    high = "∞" if value.high is None else f"{scale * value.high:{sign}.{digits}f}"
    return f" [{low}, {high}]".replace("-", MINUS)


def tokens(value: Interval | None) -> str:
    """A number of tokens with its interval: 120 [80, 190]."""
    if value is None:
        return NONE
    if value.low is None:
        return count(value.value)
    high = "∞" if value.high is None else count(value.high)
    return f"{count(value.value)} [{count(value.low)}, {high}]"


def sooner(speedup: float) -> str:
    """A ratio of times in words, also where it is no gain."""
    factor = f"{max(speedup, 1 / speedup):.1f}x"
    if factor == "1.0x":
        return "as soon"
    return f"{factor} sooner" if speedup > 1 else f"{factor} later"
