# SPDX-License-Identifier: Apache-2.0
"""The picture of one prompt: all of its tokens once, whatever its report says of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.estimate.picture import MOST_BYTES, Kind, Picture, Piece, of_report

TREATMENTS = st.lists(
    st.tuples(st.integers(1, 50), st.sampled_from(["local", "reused", "computed"])), min_size=1
)
NEAR = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=5)


@given(TREATMENTS, NEAR)
def test_the_pieces_of_a_report_are_the_prompt(
    treatments: list[tuple[int, str]], near: list[tuple[int, int]]
) -> None:
    spans, start = [], 0
    for tokens, kind in treatments:
        spans.append([start, start + tokens, kind])
        start += tokens
    pieces = of_report(spans, [[min(pair), max(pair), 0.5, "re-encoded"] for pair in near])
    assert [piece.end for piece in pieces] == [*(piece.start for piece in pieces[1:]), start]
    for word in ("local", "reused"):
        wanted = sum(tokens for tokens, kind in treatments if kind == word)
        assert sum(piece.tokens for piece in pieces if piece.kind == word) == wanted


def test_what_is_computed_is_told_apart() -> None:
    spans = [[0, 10, "computed"], [10, 30, "reused"], [30, 90, "computed"]]
    pieces = of_report(spans, [[40, 60, 0.5, "re-encoded"]])
    assert [(piece.start, piece.kind) for piece in pieces] == [
        (0, Kind.GAP),
        (10, Kind.REUSED),
        (30, Kind.COMPUTED),
        (40, Kind.COPY),
        (60, Kind.COMPUTED),
    ]


def test_text_cannot_break_out_and_is_bounded() -> None:
    bad = '</span><script>alert("x")</script>'
    pieces = [Piece(n, n + 1, Kind.COMPUTED, bad) for n in range(2000)]
    markup = Picture(bad, pieces, lambda start, end: bad * 99).markup()
    assert "<script>" not in markup
    assert len(markup.encode()) < MOST_BYTES + 2000 * 50
    assert "more tokens" in markup


def test_a_picture_may_be_without_text() -> None:
    assert "<pre>" not in Picture("p", [Piece(0, 9, Kind.LOCAL)]).markup()
