# SPDX-License-Identifier: Apache-2.0
"""Refresh: what of reused text is computed again, by the letter and against a plain reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import limits

from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.cover import cover, true_runs
from kvcomm_vllm.scheduler.index import Origin, Sequence
from kvcomm_vllm.scheduler.origin import ELSEWHERE, LEAD_TOKENS, OWN, numbered, origin, origin_by
from kvcomm_vllm.scheduler.planner import make_plan
from kvcomm_vllm.scheduler.refresh import (
    BEHIND_EDIT,
    LEAST_LOAD,
    ROLLING_SHARE,
    YOUNG_TURNS,
    Refresh,
)
from kvcomm_vllm.scheduler.repeats import GRAM, PHRASE, WORD, precedents, repeats
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan, Source

SIZE = 4

few_words = st.lists(st.integers(0, 3), max_size=60).map(lambda ids: np.array(ids, np.int32))


@given(few_words)
def test_a_repetition_is_what_stands_earlier_in_the_text(tokens: np.ndarray) -> None:
    words = tokens.tolist()
    for end, found in enumerate(repeats(tokens)):
        gram = words[end - GRAM + 1 : end + 1] if end >= GRAM - 1 else None
        earlier = [words[n : n + GRAM] for n in range(max(0, end - GRAM + 1))]
        assert bool(found & PHRASE) == (gram in earlier)
        assert bool(found & WORD) == (words[end] in words[:end])


@given(few_words)
def test_precedents_end_an_earlier_occurrence_of_the_end_or_follow_it(tokens: np.ndarray) -> None:
    words = tokens.tolist()
    ends = [n for n in range(GRAM, len(words)) if words[n - GRAM : n] == words[-GRAM:]]
    assert set(np.flatnonzero(precedents(tokens))) == {n for end in ends for n in (end - 1, end)}


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
        origin=None if repeated is None else Origin(repeated, np.zeros(len(repeated), np.int32)),
    )


def moved(sequence: Sequence, start: int, at: int, length: int) -> ReuseSpan:
    blocks = list(range(-(-len(sequence.tokens) // SIZE)))
    source = Source(sequence, start, at, length, blocks, 0, same_context=False)
    return ReuseSpan(at, at + length, 0, source)


OLD_TURN = [1, 2, 3, 4, 5, 6]
TURN = [11, 12, 13, 14, 15, 16, 3, 4, 5, 17, 18, 19, 20, 21]


def test_what_repeated_a_turn_that_was_dropped_is_computed_again() -> None:
    before = stored([*OLD_TURN, *TURN])
    after = np.array([90, 91, *TURN, 92], np.int32)
    stale = Refresh(after).stale(moved(before, len(OLD_TURN), 2, len(TURN)).source)
    assert np.flatnonzero(stale).tolist() == [TURN.index(5)]


def test_what_repeats_a_text_that_is_new_is_computed_again() -> None:
    before = stored([90, 91, *TURN])
    after = np.array([*OLD_TURN, *TURN, 92], np.int32)
    stale = Refresh(after).stale(moved(before, 2, len(OLD_TURN), len(TURN)).source)
    assert np.flatnonzero(stale).tolist() == [TURN.index(5)]


def test_an_edit_that_nothing_repeats_moves_nothing() -> None:
    before = stored([90, 91, *TURN])
    after = np.array([93, 94, 95, *TURN, *TURN[:3]], np.int32)
    assert not Refresh(after).stale(moved(before, 2, 3, len(TURN)).source).any()


def test_where_an_earlier_answer_began_is_computed_again_with_them() -> None:
    asks = [31, 32, 33]
    before = stored([*OLD_TURN, *TURN, *asks, 40, 41, 42, 43])
    after = np.array([90, *TURN, *asks, 40, 41, 42, 43, *asks], np.int32)
    span = moved(before, len(OLD_TURN), 1, len(TURN) + 7)
    stale = span.start + np.flatnonzero(Refresh(after).stale(span.source))
    first_word = after.tolist().index(40)
    assert stale.tolist()[-2:] == [first_word - 1, first_word]


def test_the_second_copy_of_a_text_is_not_reused() -> None:
    before = stored([90, 91, *TURN])
    after = np.array([*TURN, 95, *TURN, 92], np.int32)
    refresh = Refresh(after)
    first = moved(before, 2, 0, len(TURN))
    second = moved(before, 2, len(TURN) + 1, len(TURN))
    assert refresh.stale_share([first]) == 0
    assert refresh.stale_share([second]) > 0.8


def test_kv_that_was_copied_says_what_its_source_saw() -> None:
    """Over generations: not what its own text would say, as that was never computed there."""
    first = stored([*OLD_TURN, *TURN])
    prompt = np.array([90, 91, *TURN, 92], np.int32)
    span = moved(first, len(OLD_TURN), 2, len(TURN))
    own = Refresh(prompt).repeats
    saw = origin_by(prompt, own, Plan(0, (span,)), None).repeats
    assert np.flatnonzero((saw ^ own) & PHRASE).tolist() == [2 + TURN.index(5)]
    assert np.flatnonzero((saw ^ own) & WORD).tolist() == [2 + TURN.index(n) for n in (3, 4, 5)]
    again = stored(prompt.tolist(), saw)
    third = np.array([80, *TURN, 92], np.int32)
    stale = Refresh(third).stale(moved(again, 2, 1, len(TURN)).source)
    assert np.flatnonzero(stale).tolist() == [TURN.index(5)]


def test_text_generated_behind_a_copy_was_computed_where_it_stands() -> None:
    saw = np.zeros(4, np.uint8)
    sequence = stored([1, 2, 3, 9, 1, 2, 3], saw)
    assert origin(sequence).repeats.tolist() == [0] * 4 + [WORD, WORD, WORD | PHRASE]


def test_text_of_which_nothing_fits_is_no_plan_whatever_share_is_allowed() -> None:
    before = stored([90, 91, *TURN])
    after = np.array([*TURN, 95, *TURN, 92], np.int32)
    refresh = Refresh(after)
    spans = [moved(before, 2 + GRAM, len(TURN) + 1 + GRAM, len(TURN) - GRAM)]
    assert refresh.stale_share(spans) == 1
    given = limits(max_refresh_share=1.0)
    plan = make_plan(0, spans, len(after), given, lambda spans: 0.0, refresh.stale_share)
    assert plan is Reason.OUT_OF_CONTEXT


def covered(refresh: Refresh, sources: list[Source]) -> Plan:
    return Plan(0, tuple(cover(sources, 0, SIZE, refresh)))


@given(st.data())
def test_a_cut_plan_loads_what_fits_in_some_source_and_computes_the_rest(
    data: st.DataObject,
) -> None:
    words = st.integers(0, 5)
    text = data.draw(st.lists(words, min_size=8, max_size=60))
    heads = data.draw(st.lists(st.lists(words, max_size=20), min_size=1, max_size=3))
    other = data.draw(st.lists(words, max_size=20))
    prompt = np.array([*other, *text, 7], np.int32)
    refresh = Refresh(prompt)
    sources = []
    for number, head in enumerate(heads):
        sequence = stored([*head, *text])
        sequence.id = number
        sources.append(moved(sequence, len(head), len(other), len(text)).source)
    plan = covered(refresh, sources)
    cut = refresh.cut(plan, SIZE)
    loaded = np.zeros(len(prompt), np.bool_)
    for part in cut.spans:
        loaded[part.start : part.end] = True
        source = part.source
        assert (part.start, part.end) == (source.prompt_start, source.end)
        whole = sources[source.sequence.id]
        assert source.place_of(0) == whole.place_of(0)
        first, offset = divmod(source.sequence_start - whole.sequence_start, SIZE)
        assert (source.blocks[0], source.block_offset) == (first, offset)
        assert not refresh.stale(whole)[part.start - len(other) : part.end - len(other)].any()
    fits = ~np.all([refresh.stale(source) for source in sources], axis=0)
    due = np.zeros(len(prompt), np.bool_)
    for start, stop in true_runs(fits):
        due[len(other) + start : len(other) + stop] = stop - start >= LEAST_LOAD
    assert loaded.tolist() == due.tolist()
    told = sum(part.length + part.seam for part in cut.spans) + cut.refreshed_tokens
    assert told == (len(text) if cut.spans else 0)
    if plan.spans:
        share = refresh.stale_share(plan.spans)
        assert loaded.sum() == pytest.approx(len(text) * (1 - share))


def test_what_an_edit_moved_is_computed_once_and_then_taken_from_there() -> None:
    """The exact old prompt stays the source of the rest."""
    first = stored([*OLD_TURN, *TURN, 51, 52, 53])
    prompt = np.array([90, 91, *TURN, 51, 52, 53, 92], np.int32)
    refresh = Refresh(prompt)
    old = moved(first, len(OLD_TURN), 2, len(TURN) + 3).source
    plan = refresh.cut(covered(refresh, [old]), SIZE)
    hole = (2 + TURN.index(5), 2 + TURN.index(5) + 1)
    assert plan.holes()[-1] == hole
    copy = stored(prompt.tolist(), refresh.repeats)
    copy.id, copy.generation = 1, 1
    copy.origin = numbered(origin_by(prompt, refresh.repeats, plan, None), copy.id)
    again = np.array([80, *TURN, 51, 52, 53, 93], np.int32)
    refresh = Refresh(again)
    old = moved(first, len(OLD_TURN), 1, len(TURN) + 3).source
    new = moved(copy, 2, 1, len(TURN) + 3).source
    spans = refresh.cut(covered(refresh, [old, new]), SIZE).spans
    start, end = hole[0] - 1, hole[1] - 1
    assert [(span.start, span.end, span.source.sequence.id) for span in spans] == [
        (1, start, 0),
        (start, end, 1),
        (end, len(again) - 1, 0),
    ]


LEAD = list(range(1000, 1000 + LEAD_TOKENS))
DROPPED = list(range(3000, 3030))


def session(
    born: list[int], lead: list[int] = LEAD, edit: bool = True, repeated: int = 3
) -> tuple[Refresh, Plan]:
    """An agent's own earlier prompt, whose text was computed in those, behind an edit of it; the
    last tokens of the text repeat what is dropped.
    """
    text = [*range(2000, 2000 + len(born) - repeated), *DROPPED[:repeated]]
    head = [*lead, *DROPPED]
    earlier = stored([*head, *text])
    earlier.origin = Origin(origin(earlier).repeats, np.array([OWN] * len(head) + born))
    prompt = np.array([*LEAD, *([] if edit else DROPPED), 90, *text, 92], np.int32)
    refresh = Refresh(prompt)
    at = len(prompt) - 1 - len(text)
    source = moved(earlier, len(head), at, len(text)).source
    return refresh, refresh.cut(covered(refresh, [source]), SIZE)


def test_behind_an_edit_an_agents_own_text_is_computed_where_it_says_what_is_gone() -> None:
    """Its first tokens, each word said for the first time now, and the token behind that."""
    text = list(range(2000, 2100))
    text[60] = DROPPED[7]
    text[80] = text[60]  # said before in both
    before, prompt = [*LEAD, *DROPPED, *text], np.array([*LEAD, *text, 92], np.int32)
    source = moved(stored(before), len(LEAD) + len(DROPPED), len(LEAD), len(text)).source
    stale = np.flatnonzero(Refresh(prompt).stale(source)).tolist()
    assert stale == [*range(BEHIND_EDIT), 60, 61]
    behind = source.part(source.prompt_start + 40, source.end, SIZE)
    assert np.flatnonzero(Refresh(prompt).stale(behind)).tolist() == [20, 21]


def test_what_an_agent_copied_of_another_is_computed_for_phrases_alone() -> None:
    """Where all of the context is another, most words are said for the first time."""
    text = list(range(2000, 2100))
    text[60] = DROPPED[7]
    earlier = stored([*LEAD, *DROPPED, *text])
    head = len(LEAD) + len(DROPPED)
    earlier.origin = Origin(repeats(earlier.tokens), np.array([0] * head + [ELSEWHERE] * 100))
    prompt = np.array([*LEAD, *text, 92], np.int32)
    assert not Refresh(prompt).stale(moved(earlier, head, len(LEAD), 100).source).any()


@pytest.mark.parametrize("repeated", [5, 30])
def test_behind_an_edit_the_oldest_of_what_an_agent_copies_is_computed_again(repeated: int) -> None:
    born = [99] * 100 + [5] * 150 + [6] * 100 + list(range(6, 6 + YOUNG_TURNS)) * 5
    refresh, plan = session(born, repeated=repeated)
    share = min(repeated - GRAM + 1, int(ROLLING_SHARE * (len(LEAD) + 1 + len(born) + 1)))
    first = len(LEAD) + 1 + 100
    assert (first, first + share) in plan.refreshed
    prompt = np.zeros(len(refresh.repeats), np.int32)
    prompt[: len(LEAD)] = LEAD
    found = origin_by(prompt, refresh.repeats, plan, None).born
    assert found[first : first + share].tolist() == [OWN] * share
    assert found[first + share] == 5


def test_what_was_computed_a_few_turns_ago_is_not_computed_again_for_its_age() -> None:
    newest = [4 + YOUNG_TURNS] * 100
    young = newest + [5] * 260 + list(range(5, 5 + YOUNG_TURNS)) * 5
    old = newest + [4] * 260 + young[360:]
    (_, few), (_, more) = (session(born, repeated=30) for born in (young, old))
    assert more.refreshed_tokens == few.refreshed_tokens + int(ROLLING_SHARE * (len(young) + 34))


def test_what_an_edit_does_not_move_is_not_computed_again_for_its_age() -> None:
    _, plan = session(list(range(5, 105)) * 4, edit=False)
    assert plan.refreshed == ()


def test_another_agents_text_is_not_computed_again_for_its_age() -> None:
    _, plan = session(list(range(5, 105)) * 4, lead=[*LEAD[:-1], 1])
    assert len(plan.refreshed) == 1  # what repeated the turn that is gone
    assert plan.refreshed_tokens == 1


def test_of_an_agents_own_copies_the_one_computed_last_is_taken() -> None:
    text = list(range(2000, 2200))
    exact, copy = stored([*LEAD, 80, 81, *text]), stored([*LEAD, 82, *text])
    copy.id = copy.generation = 4
    copy.first_approximate = 0
    last = np.array([OWN] * (len(LEAD) + 1) + [0] * 100 + [4] * 20 + [0] * 80)
    copy.origin = numbered(Origin(np.zeros(len(last), np.uint8), last), 4)
    prompt = np.array([*LEAD, 83, 84, 85, *text, 92], np.int32)
    at = len(LEAD) + 3
    sources = [
        moved(exact, len(LEAD) + 2, at, len(text)).source,
        moved(copy, len(LEAD) + 1, at, len(text)).source,
    ]
    plan = covered(Refresh(prompt), sources)
    assert [(span.start - at, span.source.sequence.id) for span in plan.spans] == [
        (0, 0),
        (100, 4),
        (120, 0),
    ]
