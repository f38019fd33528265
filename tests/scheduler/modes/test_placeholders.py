# SPDX-License-Identifier: Apache-2.0
"""The same place of the same template is the same placeholder; another place is another."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import sequence, source

from kvcomm_vllm.scheduler.modes.placeholders import (
    EDGE_TOKENS,
    GAP_TOKENS,
    LEAD_TOKENS,
    placeholder_keys,
    span_kind,
)
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan

Tokens = list[int]


def keys(
    templates: list[Tokens],
    messages: list[int],
    namespace: bytes = b"",
    seam: int = 0,
    local: int = 0,
    output: bool = False,
) -> list[str]:
    """Keys of a prompt: template text, a message of so many tokens, template text, and so on."""
    tokens: Tokens = []
    spans = []
    of = sequence(prompt=0 if output else 400)
    for template, length in zip(templates, messages, strict=True):
        tokens += template
        start = len(tokens)
        tokens += [7] * length
        found = source(start, length, of=of)
        spans.append(ReuseSpan(start + seam, start + length, seam, found))
    return placeholder_keys(Plan(local, tuple(spans)), np.array(tokens, np.int32), namespace)


texts = st.lists(st.lists(st.integers(0, 99), max_size=20), min_size=1, max_size=4)
lengths = st.lists(st.integers(10, 50), min_size=4, max_size=4)


@given(texts, lengths, lengths, st.integers(0, 9), st.integers(0, 9))
def test_a_key_does_not_depend_on_what_arrives_in_the_placeholders(
    templates: list[Tokens], first: list[int], second: list[int], seam: int, local: int
) -> None:
    """Nor on the seam, nor on how much of the template vLLM had in its cache."""
    count = len(templates)
    one = keys(templates, first[:count], seam=seam)
    assert one == keys(templates, second[:count], local=local)


@given(
    st.lists(st.integers(0, 99), min_size=EDGE_TOKENS + 1, max_size=LEAD_TOKENS),
    st.data(),
)
def test_another_agent_is_another_placeholder(text: Tokens, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(text) - EDGE_TOKENS - 1))
    other = [*text[:place], text[place] + 1, *text[place + 1 :]]
    assert keys([text], [20]) != keys([other], [20])


@given(st.lists(st.integers(0, 99), min_size=2 * EDGE_TOKENS + 1, max_size=20), st.data())
def test_another_lead_is_another_row_of_the_same_agent(text: Tokens, data: st.DataObject) -> None:
    agent = list(range(30))
    first = max(EDGE_TOKENS, len(text) - EDGE_TOKENS - GAP_TOKENS)
    place = data.draw(st.integers(first, len(text) - EDGE_TOKENS - 1))
    other = [*text[:place], text[place] + 1, *text[place + 1 :]]
    one, two = keys([agent, text], [20, 20]), keys([agent, other], [20, 20])
    assert one[0] == two[0]
    assert one[1] != two[1]


@given(st.lists(st.integers(0, 99), min_size=2 * EDGE_TOKENS, max_size=20), st.data())
def test_edge_tokens_do_not_count(text: Tokens, data: st.DataObject) -> None:
    """They may merge with the message beside them."""
    agent = list(range(30))
    edges = [*range(EDGE_TOKENS), *range(len(text) - EDGE_TOKENS, len(text))]
    place = data.draw(st.sampled_from(edges))
    other = [*text[:place], text[place] + 1, *text[place + 1 :]]
    assert keys([agent, text], [20, 20]) == keys([agent, other], [20, 20])


def test_the_tail_of_a_message_in_front_of_a_lead_changes_nothing() -> None:
    """A source's last partial page is gone, so some of its text is computed before the lead."""
    agent, lead = list(range(30)), list(range(50, 60))
    assert keys([agent, lead], [20, 20]) == keys([agent, [7, 8, 9, *lead]], [20, 20])


def test_another_agent_has_other_placeholders_behind_the_same_lead() -> None:
    intro, other, between = list(range(10)), list(range(50, 60)), list(range(20, 30))
    assert keys([intro, between], [20, 20])[1] != keys([other, between], [20, 20])[1]


def test_tenants_do_not_share_placeholders() -> None:
    assert keys([[1, 2, 3]], [20], b"red") != keys([[1, 2, 3]], [20], b"blue")


def test_an_answer_and_a_prompt_are_different_kinds_of_source() -> None:
    of = sequence(prompt=100)
    kinds = [span_kind(ReuseSpan(0, 20, 0, source(0, 20, at, of=of))) for at in (99, 100)]
    assert kinds == ["prompt", "output"]
    assert keys([[1, 2, 3]], [20]) != keys([[1, 2, 3]], [20], output=True)
