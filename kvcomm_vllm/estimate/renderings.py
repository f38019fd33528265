# SPDX-License-Identifier: Apache-2.0
"""Renderings: what was done to a text so that its copy has other tokens, and what to do instead.

Each way is undone on both texts; the one after which most lines are the same has its name. So a
name is not a guess from looks, but nothing says which of the two texts came first.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass

MOST_CHARACTERS = 1 << 16  # of each text
LEAST_SHARE = 0.5  # of lines, or runs of words, that are the same afterwards
LEAST_GAIN = 0.2
WORDS = 5
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "/": "/"}


@dataclass(frozen=True)
class Rendering:
    """``advice``: what a sender can change, a sentence."""

    name: str
    advice: str
    undo: Callable[[str], str]


def _no_json(text: str) -> str:
    return re.sub(r'\\([ntr"\\/])', lambda found: _ESCAPES[found[1]], text)


def _no_numbers(text: str) -> str:
    return re.sub(r"(?m)^[ \t]*\d+(?:\t|[ \t]*[|→] ?|[:.)] ?)", "", text)


def _no_quotes(text: str) -> str:
    return re.sub(r"(?m)^(?:> ?)+", "", text)


def _no_indent(text: str) -> str:
    return re.sub(r"(?m)^[ \t]+", "", text)


def _lf(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


RENDERINGS = (  # of equal ones the first has the name
    Rendering("indent", "Do not indent the text; fence it.", _no_indent),
    Rendering("CRLF", "Turn CRLF into LF where text enters the system.", _lf),
    Rendering("block quote", "Fence the text instead of quoting it line by line.", _no_quotes),
    Rendering("line numbers", "Number lines always or never, and in one format.", _no_numbers),
    Rendering("HTML escapes", "Escape where text is shown, not where it is sent.", html.unescape),
    Rendering("JSON string", "Put the text beside the JSON, as raw text.", _no_json),
    Rendering(
        "JSON string with line numbers",
        "Put the text beside the JSON, and number lines always or never.",
        lambda text: _no_numbers(_no_json(text)),
    ),
)
WRAPPED = Rendering("other wrapping", "Do not wrap the text again.", str)


def rendering(text: str, original: str) -> Rendering | None:
    """What makes ``text`` another rendering of ``original``, whichever came first; None where
    nothing known does.
    """
    text, original = text[:MOST_CHARACTERS], original[:MOST_CHARACTERS]
    plain = _same_lines(text, original)
    best: Rendering | None = None
    most = max(LEAST_SHARE, plain + LEAST_GAIN)
    for candidate in RENDERINGS:
        undone = (_no_indent(candidate.undo(given)) for given in (text, original))
        share = _same_lines(*undone)  # blanks behind a number may be its own, or the line's
        if share > most:
            best, most = candidate, share
    if best is None and _same(_runs(text), _runs(original)) >= LEAST_SHARE:
        return WRAPPED
    return best


def _same_lines(text: str, original: str) -> float:
    return _same(_lines(text), _lines(original))


def _lines(text: str) -> set[str]:
    """Whole lines alone: the first and the last may be cut."""
    return {line for line in text.split("\n")[1:-1] if line.strip()}


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[n : n + WORDS]) for n in range(len(words) - WORDS + 1)}


def _same(some: set[str] | set[tuple[str, ...]], others: set[str] | set[tuple[str, ...]]) -> float:
    fewer = min(len(some), len(others))
    return len(some & others) / fewer if fewer else 0.0
