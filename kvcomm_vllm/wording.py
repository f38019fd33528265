# SPDX-License-Identifier: Apache-2.0
"""What somebody else gave us, put into a message: short, printable, on one line, at bounded cost.

``repr`` is none of that: it raises for a whole number of more than 4300 digits, follows lists into
any depth, and repeats megabytes.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from itertools import islice
from typing import Self

MAX_SHOWN = 80
MAX_TEXT = 40
MAX_DIGITS = 40
MAX_ITEMS = 4
MAX_DEPTH = 2


class Explained(enum.StrEnum):
    """Words that say what they mean: ``.value`` is the word, ``.explanation`` is for readers."""

    explanation: str

    def __new__(cls, word: str, explanation: str) -> Self:
        member = str.__new__(cls, word)
        member._value_ = word
        member.explanation = explanation
        return member


def shown(value: object) -> str:
    """``value`` much as Python writes it, in at most ``MAX_SHOWN`` characters."""
    return _cut(_shown(value, MAX_DEPTH), MAX_SHOWN)


def one_line(text: str, most: int = 200) -> str:
    """``text`` as it is if it can be printed on one line, else escaped; of more than ``most``
    characters the middle ones are left out.
    """
    if len(text) > most:
        text = f"{text[: most // 3]}...{text[-(most // 3) :]}"
    return text if text.isprintable() and text else _cut(repr(text), most)


def _shown(value: object, depth: int) -> str:
    if value is ...:
        return "..."
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return _number(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, (str, bytes)):
        return repr(value[:MAX_TEXT]) + ("..." if len(value) > MAX_TEXT else "")
    if isinstance(value, (list, tuple)):
        items = (_shown(item, depth - 1) for item in value)
        return f"[{_joined(items, len(value), depth)}]"
    if isinstance(value, dict):
        items = (f"{_shown(k, depth - 1)}: {_shown(v, depth - 1)}" for k, v in value.items())
        return f"{{{_joined(items, len(value), depth)}}}"
    return f"<{type(value).__name__}>"


def _number(value: int) -> str:
    digits = int(value.bit_length() * math.log10(2)) + 1
    return int.__repr__(value) if digits <= MAX_DIGITS else f"<number of about {digits} digits>"


def _joined(items: Iterator[str], count: int, depth: int) -> str:
    if count and not depth:
        return "..."
    return ", ".join([*islice(items, MAX_ITEMS), *(["..."] if count > MAX_ITEMS else [])])


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
