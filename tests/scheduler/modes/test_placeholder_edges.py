# SPDX-License-Identifier: Apache-2.0
"""A placeholder stays itself where its text was tokenised otherwise at an edge, or cut in two."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import sequence, source

from kvcomm_vllm.scheduler.modes.placeholders import (
    CUT_TOKENS,
    NEAR_TOKENS,
    Placeholder,
    placeholder_keys,
    placeholders,
)
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan

AGENT, LEAD, MESSAGE = list(range(100, 140)), list(range(200, 208)), list(range(300, 360))
TOKENS = np.array([*AGENT, *MESSAGE, *LEAD, *MESSAGE, 9, 9], np.int32)
FIRST = (len(AGENT), len(AGENT) + len(MESSAGE))
SECOND = (FIRST[1] + len(LEAD), FIRST[1] + len(LEAD) + len(MESSAGE))
ANSWER, PROMPT = sequence(prompt=0), sequence(prompt=400)


def plan(*runs: tuple[int, int], seam: int = 0) -> Plan:
    """Each run from a source of its own."""
    spans = [
        ReuseSpan(start + seam, end, seam, source(start, end - start, of=sequence(prompt=400)))
        for start, end in runs
    ]
    return Plan(0, tuple(spans))


def find(of: Plan, known: dict[str, int] | None = None) -> list[Placeholder]:
    return placeholders(of, TOKENS, b"", lambda key: (known or {}).get(key, 0) > 0)


def test_without_anchors_a_placeholder_is_where_its_span_begins() -> None:
    usual = plan(FIRST, SECOND)
    found = find(usual)
    assert [one.key for one in found] == placeholder_keys(usual, TOKENS, b"")
    assert [one.start for one in found] == [FIRST[0], SECOND[0]]


@given(st.integers(-NEAR_TOKENS, NEAR_TOKENS), st.sampled_from([0, 16]))
def test_a_span_that_begins_a_little_earlier_or_later_is_found_in_its_placeholder(
    shift: int, seam: int
) -> None:
    """With the tokens counted from where the placeholder begins."""
    usual = placeholder_keys(plan(FIRST, SECOND), TOKENS, b"")[1]
    moved = plan(FIRST, (SECOND[0] + shift, SECOND[1]), seam=seam)
    assert find(moved, {usual: 5})[1] == Placeholder(usual, SECOND[0])


@given(st.integers(-NEAR_TOKENS, NEAR_TOKENS))
def test_the_first_row_of_a_short_prompt_is_found_as_well(shift: int) -> None:
    usual = placeholder_keys(plan(FIRST, SECOND), TOKENS, b"")
    moved = plan((FIRST[0] + shift, FIRST[1]), SECOND)
    assert [one.key for one in find(moved, dict.fromkeys(usual, 3))] == usual


def test_of_several_placeholders_the_nearest_that_knows_anything_is_taken() -> None:
    """Another placeholder whose lead ends in the same words must not take what belongs here."""
    near = placeholder_keys(plan(FIRST, (SECOND[0] + 2, SECOND[1])), TOKENS, b"")[1]
    here = placeholder_keys(plan(FIRST, SECOND), TOKENS, b"")[1]
    assert find(plan(FIRST, SECOND), {near: 20, here: 1})[1] == Placeholder(here, SECOND[0])
    assert find(plan(FIRST, SECOND), {near: 20})[1] == Placeholder(near, SECOND[0] + 2)


def test_a_placeholder_further_away_is_another_one() -> None:
    usual = placeholder_keys(plan(FIRST, SECOND), TOKENS, b"")[1]
    moved = plan(FIRST, (SECOND[0] + NEAR_TOKENS + 1, SECOND[1]))
    assert find(moved, {usual: 5})[1].key != usual


def cut(at: int, missing: int, of_both: bool = True) -> Plan:
    """The second message in two parts, with some tokens between them that differ."""
    start, end = SECOND
    middle = start + at
    one, other = sequence(prompt=400), sequence(prompt=400)
    return Plan(
        0,
        (
            ReuseSpan(*FIRST, 0, source(FIRST[0], len(MESSAGE), of=sequence(prompt=400))),
            ReuseSpan(start, middle, 0, source(start, at, of=one)),
            ReuseSpan(
                middle + missing,
                end,
                0,
                source(
                    middle + missing,
                    end - middle - missing,
                    at + missing,
                    of=one if of_both else other,
                ),
            ),
        ),
    )


def test_both_parts_of_a_message_are_in_its_placeholder_and_count_on() -> None:
    for missing in (1, CUT_TOKENS):
        found = find(cut(20, missing))
        assert found[2] == found[1] == Placeholder(found[1].key, SECOND[0])


def test_parts_from_different_sources_or_far_apart_are_placeholders_of_their_own() -> None:
    for apart in (cut(20, 3, of_both=False), cut(20, CUT_TOKENS + 1)):
        found = find(apart)
        assert found[2].start > SECOND[0]
