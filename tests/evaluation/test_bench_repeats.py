# SPDX-License-Identifier: Apache-2.0
"""Repeated tokens are counted as by looking at every run of 16."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.evaluation.bench.repeats import WINDOW, Repeated, Repeats

texts = st.lists(st.integers(0, 2), max_size=60)


def by_looking(earlier: list[list[int]], tokens: list[int]) -> int:
    runs = {tuple(text[i : i + WINDOW]) for text in earlier for i in range(len(text) - WINDOW + 1)}
    covered: set[int] = set()
    for start in range(len(tokens) - WINDOW + 1):
        if tuple(tokens[start : start + WINDOW]) in runs:
            covered |= set(range(start, start + WINDOW))
    return len(covered)


@given(st.lists(texts, max_size=4), texts, st.integers(0, 40), st.integers(0, 40))
def test_the_count_is_that_of_looking_at_every_run(
    earlier: list[list[int]], tokens: list[int], start: int, length: int
) -> None:
    repeats = Repeats()
    for text in earlier:
        repeats.add(text)
    if earlier:  # something that surely occurs
        tokens = tokens + earlier[0][start : start + length]
    assert repeats.count(tokens).tokens == by_looking(earlier, tokens)


def test_a_text_shorter_than_a_window_repeats_nothing() -> None:
    repeats = Repeats()
    repeats.add([1] * 15)
    assert repeats.count([1] * 15) == Repeated(0, 0)
    repeats.add([1] * 16)
    assert repeats.count([1] * 15) == Repeated(0, 0)
    assert repeats.count([1] * 17) == Repeated(17, 1)


def test_zero_is_a_token_like_others() -> None:
    repeats = Repeats()
    repeats.add([0] * 16)
    assert repeats.count([0] * 16).tokens == 16
    assert repeats.count([0] * 15 + [1]).tokens == 0


def test_texts_in_another_order_are_a_run_each() -> None:
    first, second, third = ([number * 100 + i for i in range(40)] for number in range(3))
    repeats = Repeats()
    repeats.add([*first, *second, *third])
    assert repeats.count([*first, *second]) == Repeated(80, 1)
    assert repeats.count([*third, *first, 7, *second]) == Repeated(120, 3)
