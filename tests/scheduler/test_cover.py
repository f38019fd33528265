# SPDX-License-Identifier: Apache-2.0
"""Token by token the most exact source there is, and no seam where the text before is common."""

from __future__ import annotations

from itertools import count, pairwise

from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import SIZE, sequence, source

from kvcomm_vllm.scheduler.cover import cover
from kvcomm_vllm.scheduler.index import Sequence
from kvcomm_vllm.scheduler.spans import Source

_ids = count(1)


def of(generation: int = 0, first_approximate: int | None = None) -> Sequence:
    """A sequence whose KV is that many copies away from exact, all of it or from a token on."""
    made = sequence(600, first_approximate=0 if generation else None)
    if first_approximate is not None:
        made.first_approximate = first_approximate
    made.generation = generation or (first_approximate is not None)
    made.id = next(_ids)
    return made


@st.composite
def overlapping(draw: st.DrawFn) -> list[Source]:
    found = []
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, 80))
        at = draw(st.integers(0, 200))
        found.append(
            source(
                start,
                draw(st.integers(1, 60)),
                sequence_start=at,
                same_context=draw(st.booleans()),
                lead=draw(st.integers(0, min(start, at, 30))),
                of=of(draw(st.integers(0, 2)), draw(st.none() | st.integers(0, 260))),
            )
        )
    return found


def usable(one: Source, position: int, seam: int) -> int | None:
    """The generation of KV that a source gives at a position; None if it gives none."""
    begin = one.prompt_start if one.same_context else one.prompt_start + max(0, seam - one.lead)
    if not begin <= position < one.end:
        return None
    at = one.sequence_start + position - one.prompt_start
    exact = at < one.sequence.exact_tokens
    return (0 if exact else one.sequence.generation) + (not one.same_context)


@given(overlapping(), st.integers(0, 20))
def test_each_token_comes_from_the_youngest_generation_there_is(
    sources: list[Source], seam: int
) -> None:
    spans = cover(sources, seam, SIZE)
    for before, after in pairwise(spans):
        assert before.end <= after.start
    taken = {p: span for span in spans for p in range(span.start, span.end)}
    for position in range(150):
        best = min(
            (g for one in sources if (g := usable(one, position, seam)) is not None), default=None
        )
        assert (position in taken) == (best is not None)
        if best is not None:
            span = taken[position]
            assert usable(span.source, position, 0) == best


@given(overlapping(), st.integers(0, 20))
def test_a_span_reads_its_own_slots_of_its_source(sources: list[Source], seam: int) -> None:
    for span in cover(sources, seam, SIZE):
        part = span.source
        (whole,) = [one for one in sources if one.sequence is part.sequence]
        shift = part.prompt_start - whole.prompt_start
        assert part.sequence_start == whole.sequence_start + shift
        assert part.lead == whole.lead + shift
        assert (part.prompt_start, part.end) == (span.start - span.seam, span.end)
        slot = (whole.blocks[0] - 100) * SIZE + whole.block_offset + shift
        assert (part.blocks[0] - 100) * SIZE + part.block_offset == slot
        last = part.sequence_start + part.length - 1
        assert part.blocks[-1] == 100 + last // SIZE


def test_a_longer_copy_does_not_hide_the_exact_text() -> None:
    exact, copied = source(30, 500, of=of()), source(30, 511, of=of(1))
    spans = cover([exact, copied], 16, SIZE)
    assert [(span.start, span.end, span.seam) for span in spans] == [(46, 530, 16), (530, 541, 0)]
    assert spans[0].source.sequence is exact.sequence
    assert spans[1].continues


def test_where_one_source_ends_inside_the_text_the_next_needs_no_seam() -> None:
    first, second = source(0, 100, of=of()), source(60, 100, 160, of=of())
    spans = cover([first, second], 16, SIZE)
    assert sum(span.seam for span in spans) == 16
    assert spans[-1].end == 160
    assert sum(span.length for span in spans) == 144


def test_messages_that_only_touch_have_a_seam_each() -> None:
    spans = cover([source(0, 40, of=of()), source(40, 40, 100, of=of())], 16, SIZE)
    assert [(span.start, span.seam) for span in spans] == [(16, 16), (56, 16)]
    assert not spans[1].continues


def test_behind_a_lost_page_there_is_no_second_seam() -> None:
    text = of()
    spans = cover([source(0, 40, of=text), source(44, 40, 44, of=text, lead=44)], 16, SIZE)
    assert [(span.start, span.seam) for span in spans] == [(16, 16), (44, 0)]
