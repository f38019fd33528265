# SPDX-License-Identifier: Apache-2.0
"""Refresh: what of reused text is computed again, by the letter and against a plain reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.scheduler.index import Sequence
from kvcomm_vllm.scheduler.refresh import LEAST_LOAD, Refresh, runs, seen_by, seen_repeats
from kvcomm_vllm.scheduler.repeats import GRAM, precedents, repeats
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan, Source

few_words = st.lists(st.integers(0, 3), max_size=60).map(lambda ids: np.array(ids, np.int32))


@given(few_words)
def test_a_repetition_is_what_stands_earlier_in_the_text(tokens: np.ndarray) -> None:
    words = tokens.tolist()
    for end, found in enumerate(repeats(tokens).tolist()):
        gram = words[end - GRAM + 1 : end + 1] if end >= GRAM - 1 else None
        earlier = [words[n : n + GRAM] for n in range(max(0, end - GRAM + 1))]
        assert found == (gram in earlier)


@given(few_words)
def test_precedents_end_an_earlier_occurrence_of_the_end_or_follow_it(tokens: np.ndarray) -> None:
    words = tokens.tolist()
    ends = [n for n in range(GRAM, len(words)) if words[n - GRAM : n] == words[-GRAM:]]
    assert set(np.flatnonzero(precedents(tokens))) == {n for end in ends for n in (end - 1, end)}


@given(st.lists(st.booleans(), max_size=80).map(lambda kept: np.array(kept, np.bool_)))
def test_only_runs_worth_an_operation_are_loaded(kept: np.ndarray) -> None:
    found = runs(kept)
    assert all(stop - start >= LEAST_LOAD and kept[start:stop].all() for start, stop in found)
    loaded = np.zeros(len(kept), np.bool_)
    for start, stop in found:
        assert not loaded[max(0, start - 1) : stop].any()
        loaded[start:stop] = True
    missed = kept & ~loaded
    assert all(stop - start < LEAST_LOAD for start, stop in _runs(missed))


def _runs(marks: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(marks, prepend=False, append=False)).reshape(-1, 2)
    return [(int(a), int(b)) for a, b in edges]


def stored(tokens: list[int], repeated: np.ndarray | None = None) -> Sequence:
    return Sequence(
        id=0,
        namespace=b"",
        tokens=np.array(tokens, np.int32),
        block_hashes=[],
        num_prompt_tokens=len(tokens),
        first_approximate=None if repeated is None else 0,
        ready=True,
        owner="",
        repeats=repeated,
    )


def moved(sequence: Sequence, start: int, at: int, length: int) -> ReuseSpan:
    blocks = list(range(-(-len(sequence.tokens) // 4)))
    source = Source(sequence, start, at, length, blocks, 0, same_context=False)
    return ReuseSpan(at, at + length, 0, source)


OLD_TURN = [1, 2, 3, 4, 5, 6]
TURN = [11, 12, 13, 14, 15, 16, 3, 4, 5, 17, 18, 19, 20, 21]


def test_what_repeated_a_turn_that_was_dropped_is_computed_again() -> None:
    before = stored([*OLD_TURN, *TURN])
    after = np.array([90, 91, *TURN, 92], np.int32)
    stale = Refresh(after).stale(moved(before, len(OLD_TURN), 2, len(TURN)))
    assert np.flatnonzero(stale).tolist() == [TURN.index(5)]


def test_what_repeats_a_text_that_is_new_is_computed_again() -> None:
    before = stored([90, 91, *TURN])
    after = np.array([*OLD_TURN, *TURN, 92], np.int32)
    stale = Refresh(after).stale(moved(before, 2, len(OLD_TURN), len(TURN)))
    assert np.flatnonzero(stale).tolist() == [TURN.index(5)]


def test_an_edit_that_nothing_repeats_moves_nothing() -> None:
    before = stored([90, 91, *TURN])
    after = np.array([93, 94, 95, *TURN, *TURN[:3]], np.int32)
    assert not Refresh(after).stale(moved(before, 2, 3, len(TURN))).any()


def test_where_an_earlier_answer_began_is_computed_again_with_them() -> None:
    asks = [31, 32, 33]
    before = stored([*OLD_TURN, *TURN, *asks, 40, 41, 42, 43])
    after = np.array([90, *TURN, *asks, 40, 41, 42, 43, *asks], np.int32)
    span = moved(before, len(OLD_TURN), 1, len(TURN) + 7)
    stale = span.start + np.flatnonzero(Refresh(after).stale(span))
    first_word = after.tolist().index(40)
    assert stale.tolist()[-2:] == [first_word - 1, first_word]


def test_the_second_copy_of_a_text_is_not_reused() -> None:
    before = stored([90, 91, *TURN])
    after = np.array([*TURN, 95, *TURN, 92], np.int32)
    refresh = Refresh(after)
    first = moved(before, 2, 0, len(TURN))
    second = moved(before, 2, len(TURN) + 1, len(TURN))
    assert refresh.stale_share(first) == 0
    assert refresh.stale_share(second) > 0.8


def test_kv_that_was_copied_says_what_its_source_saw() -> None:
    """Over generations: not what its own text would say, as that was never computed there."""
    first = stored([*OLD_TURN, *TURN])
    prompt = np.array([90, 91, *TURN, 92], np.int32)
    span = moved(first, len(OLD_TURN), 2, len(TURN))
    own = Refresh(prompt).repeats
    saw = seen_by(own, Plan(0, (span,)), None)
    assert np.flatnonzero(saw != own).tolist() == [2 + TURN.index(5)]
    again = stored(prompt.tolist(), saw)
    third = np.array([80, *TURN, 92], np.int32)
    stale = Refresh(third).stale(moved(again, 2, 1, len(TURN)))
    assert np.flatnonzero(stale).tolist() == [TURN.index(5)]


def test_text_generated_behind_a_copy_was_computed_where_it_stands() -> None:
    saw = np.zeros(4, np.bool_)
    sequence = stored([1, 2, 3, 9, 1, 2, 3], saw)
    assert seen_repeats(sequence).tolist() == [False] * 6 + [True]


@given(st.data())
def test_a_cut_plan_loads_what_is_kept_and_computes_the_rest(data: st.DataObject) -> None:
    text = data.draw(st.lists(st.integers(0, 5), min_size=8, max_size=60))
    head, other = (data.draw(st.lists(st.integers(0, 5), max_size=20)) for _ in range(2))
    sequence = stored([*head, *text])
    prompt = np.array([*other, *text, 7], np.int32)
    span = moved(sequence, len(head), len(other), len(text))
    refresh = Refresh(prompt)
    plan = refresh.cut(Plan(len(other), (span,)), 4)
    loaded = np.zeros(len(prompt), np.bool_)
    for part in plan.spans:
        loaded[part.start : part.end] = True
        source = part.source
        assert part.start - part.seam == source.prompt_start
        shift = span.source.sequence_start - span.source.prompt_start
        assert source.sequence_start == source.prompt_start + shift
        first, offset = divmod(source.sequence_start - span.source.sequence_start, 4)
        assert (source.blocks[0], source.block_offset) == (first, offset)
    kept = ~refresh.stale(span)
    assert not loaded[len(other) : len(other) + len(text)][~kept].any()
    share = refresh.stale_share(span)
    assert loaded.sum() == pytest.approx(len(text) * (1 - share))
