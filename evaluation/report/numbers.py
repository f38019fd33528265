# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them, a dash where there is none; each text keeps its number."""

from __future__ import annotations

from typing import Any

from kvcomm_vllm.evaluation.report.intervals import Interval

NONE = "–"
MINUS = "−"


class Shown(str):
    """A cell of a table as it is shown; ``value`` is what stands in JSON."""

    value: Any

    def __new__(cls, text: str, value: Any = None) -> Shown:
        shown = super().__new__(cls, text)
        shown.value = value
        return shown


def word(text: str) -> Shown:
    """A cell that is no number."""
    return Shown(text, text)


def count(value: float | None) -> Shown:
    """A whole number with thousands separators."""
    return _number(value, ",.0f")


def fixed(value: float | None, digits: int = 1) -> Shown:
    """A number with so many decimals."""
    return _number(value, f",.{digits}f")


def share(value: float | None) -> Shown:
    """A share in 0..1 as a percentage."""
    return _number(value, ".1%")


def _number(value: float | None, how: str) -> Shown:
    return Shown(NONE) if value is None else Shown(f"{value:{how}}".replace("-", MINUS), value)


def times(value: Interval | None) -> Shown:
    """A ratio with its interval: 4.51× [4.10, 4.93]."""
    digits = 2 if value is not None and value.value < 10 else 1
    return _with_ends(value, f".{digits}f", unit="×")


def points(value: Interval | None) -> Shown:
    """A difference of shares in percentage points, with its interval: −1.2 [−4.0, +1.5]."""
    return _with_ends(value, "+.1f", scale=100.0)


def tokens(value: Interval | None) -> Shown:
    """A number of tokens with its interval: 120 [80, 190]."""
    return _with_ends(value, ",.0f")


def _with_ends(value: Interval | None, how: str, scale: float = 1.0, unit: str = "") -> Shown:
    if value is None:
        return Shown(NONE)
    text = f"{scale * value.value:{how}}{unit}"
    if value.low is not None:
        high = "∞" if value.high is None else f"{scale * value.high:{how}}"
        text += f" [{scale * value.low:{how}}, {high}]"
    return Shown(text.replace("-", MINUS), value)


def between(value: Interval, digits: int, scale: float = 1.0) -> str:
    """An interval in words, in brackets; nothing where there is none."""
    if value.low is None or value.high is None:
        return ""
    ends = (fixed(scale * end, digits) for end in (value.low, value.high))
    return f" (95% interval {' to '.join(ends)})"


def sooner(speedup: float) -> str:
    """A ratio of times in words, also where it is no gain."""
    factor = f"{max(speedup, 1 / speedup):.1f}x"
    if factor == "1.0x":
        return "as soon"
    return f"{factor} sooner" if speedup > 1 else f"{factor} later"
