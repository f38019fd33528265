# SPDX-License-Identifier: Apache-2.0
"""Holes are cut into forwards that vLLM's buffers can take, each behind what it attends to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.messages import HoleOp
from kvcomm_vllm.worker.side_forward import Row, batches

rows = st.lists(
    st.builds(
        Row,
        block_ids=st.lists(st.integers(1, 99), min_size=1, max_size=3),
        hole=st.builds(
            HoleOp,
            start=st.integers(0, 1000),
            tokens=st.lists(st.integers(0, 500), min_size=1, max_size=40),
        ),
        shift=st.sampled_from([0, 7]),
    ),
    max_size=6,
)
limits = st.integers(1, 50)
MANY = 1000


def tokens_of(pieces: list[Row]) -> list[tuple[list[int], int, int, int]]:
    """Every token with its block table, place and shift."""
    return [
        (row.block_ids, row.hole.start + i, row.shift, token)
        for row in pieces
        for i, token in enumerate(row.hole.tokens)
    ]


@given(given_rows=rows, limit=limits)
def test_every_token_is_computed_once_at_its_place_and_in_order(
    given_rows: list[Row], limit: int
) -> None:
    """In order: a row's later piece attends to its earlier one, a later hole to an earlier hole."""
    cut = batches(given_rows, limit, MANY)
    assert tokens_of([row for batch in cut for row in batch]) == tokens_of(given_rows)


@given(given_rows=rows, limit=limits)
def test_no_forward_is_larger_than_the_limit_or_empty(given_rows: list[Row], limit: int) -> None:
    for batch in batches(given_rows, limit, MANY):
        assert 1 <= len(tokens_of(batch)) <= limit
        assert all(row.hole.tokens for row in batch)


@given(given_rows=rows, limit=limits)
def test_there_are_no_more_forwards_than_needed(given_rows: list[Row], limit: int) -> None:
    total = len(tokens_of(given_rows))
    assert len(batches(given_rows, limit, MANY)) == -(-total // limit)


@given(given_rows=rows)
def test_what_fits_is_not_cut(given_rows: list[Row]) -> None:
    total = len(tokens_of(given_rows))
    assert batches(given_rows, total + 1, MANY) == ([given_rows] if given_rows else [])


@given(given_rows=rows, limit=limits, most=st.integers(1, 5))
def test_no_forward_has_more_rows_than_vllm_has_requests(
    given_rows: list[Row], limit: int, most: int
) -> None:
    cut = batches(given_rows, limit, most)
    assert all(len(batch) <= most for batch in cut)
    assert tokens_of([row for batch in cut for row in batch]) == tokens_of(given_rows)
