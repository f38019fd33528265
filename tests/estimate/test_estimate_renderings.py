# SPDX-License-Identifier: Apache-2.0
"""A rendering is named by what undoes it, whichever of the two texts came first."""

from __future__ import annotations

import html
import json

import pytest

from kvcomm_vllm.estimate.losses import EXPLANATIONS, Part
from kvcomm_vllm.estimate.renderings import RENDERINGS, WRAPPED, rendering
from kvcomm_vllm.reasons import Reason

CODE = "\n".join(
    [
        "def serve(request, cache):",
        '    """Answer a request, from the cache if it is there."""',
        "    key = name_of(request)",
        '    if key not in cache and "fresh" not in request.flags:',
        "        cache[key] = compute(request)",
        "        for listener in cache.listeners:",
        "            listener.told(key, len(cache) < 7 & 3)",
        "    return cache[key]",
        "",
        "def name_of(request):",
        '    return f"{request.agent}/{request.number}"',
        "",
    ]
)
PROSE = " ".join(
    f"The {n}th of the hills is called {n * 7}, and nobody has seen number {n * 3} from there,"
    for n in range(30)
)
LINES = CODE.split("\n")
MADE = {
    "CRLF": CODE.replace("\n", "\r\n"),
    "block quote": "\n".join(f"> {line}" for line in LINES),
    "line numbers": "\n".join(f"{n:6}\t{line}" for n, line in enumerate(LINES, 1)),
    "indent": "\n".join(f"    {line}" for line in LINES),
    "HTML escapes": html.escape(CODE.replace("(", "<").replace(":", ">")),
    "JSON string": json.dumps({"code": CODE}),
    "JSON string with line numbers": json.dumps(
        "\n".join(f"{n}: {line}" for n, line in enumerate(LINES, 1))
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_each_rendering_is_told_in_both_directions(name: str) -> None:
    original = html.unescape(MADE[name]) if name == "HTML escapes" else CODE
    for text, other in ((MADE[name], original), (original, MADE[name])):
        found = rendering(text, other)
        assert found is not None
        assert found.name == name
        assert found.advice.endswith(".")


@pytest.mark.parametrize("style", ["{n}: {line}", "{n}| {line}", "{n:4}→{line}", "{n}\t{line}"])
def test_lines_are_numbered_in_many_ways(style: str) -> None:
    numbered = "\n".join(style.format(n=n, line=line) for n, line in enumerate(LINES, 8))
    found = rendering(numbered, CODE)
    assert found is not None
    assert found.name == "line numbers"


def test_other_wrapping_is_told_by_words() -> None:
    words = PROSE.split()
    wide = "\n".join(" ".join(words[n : n + 14]) for n in range(0, len(words), 14))
    narrow = "\n".join(" ".join(words[n : n + 9]) for n in range(0, len(words), 9))
    assert rendering(wide, narrow) is WRAPPED


def test_what_was_edited_all_over_has_no_name() -> None:
    edited = " ".join(w if n % 4 else "other" for n, w in enumerate(PROSE.split()))
    assert rendering(edited, PROSE) is None
    assert rendering("", CODE) is None


def test_every_rendering_is_tried() -> None:
    assert set(MADE) == {known.name for known in RENDERINGS}


def test_no_part_has_the_word_of_a_reason() -> None:
    assert len(EXPLANATIONS) == len(Part) + len(Reason)
