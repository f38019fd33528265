# SPDX-License-Identifier: Apache-2.0
"""Source pages are vLLM's own: found by hash, held while used, given back in vLLM's order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import SIZE, sequence
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from kvcomm_vllm.scheduler.index import Match, Sequence
from kvcomm_vllm.scheduler.pages import SourcePages

PAGES = 20


def stored(present: list[bool]) -> tuple[SourcePages, Sequence]:
    """A sequence of which only some pages are still cached; page of index n has id n + 1."""
    pool = BlockPool(PAGES, enable_caching=True, hash_block_size=SIZE)
    of = sequence(tokens=len(present) * SIZE)
    blocks = pool.get_new_blocks(len(present))
    for block, block_hash, there in zip(blocks, of.block_hashes, present, strict=True):
        if there:
            key = make_block_hash_with_group_id(BlockHash(block_hash), 0)
            pool._insert_block_hash(key, block, num_tokens=SIZE)
    pool.free_blocks(reversed(blocks))
    return SourcePages(pool, SIZE), of


@given(st.lists(st.booleans(), min_size=1, max_size=PAGES - 1), st.integers(-30, 60), st.data())
def test_sources_are_exactly_the_matched_tokens_whose_pages_are_cached(
    present: list[bool], shift: int, data: st.DataObject
) -> None:
    pages, of = stored(present)
    total = len(present) * SIZE
    start = data.draw(st.integers(max(0, -shift), max(0, -shift, total - 1)))
    if start >= total:
        return
    length = data.draw(st.integers(1, total - start))
    prompt = np.arange(1000, 1000 + start + length + abs(shift), dtype=np.int32)
    found = pages.sources(Match(of, start + shift, start, length), prompt)
    covered = []
    for run in found:
        assert run.prompt_start - run.sequence_start == shift
        for n in range(run.length):
            page, offset = divmod(run.block_offset + n, SIZE)
            position = run.sequence_start + n
            assert (run.blocks[page], offset) == (position // SIZE + 1, position % SIZE)
            covered.append(position)
        assert len(run.blocks) == -(-(run.block_offset + run.length) // SIZE)
        assert pages.hashes(run) == [of.block_hashes[page - 1] for page in run.blocks]
    wanted = [p for p in range(start, start + length) if present[p // SIZE]]
    assert covered == wanted


def test_same_context_needs_the_same_place_and_the_same_beginning() -> None:
    pages, of = stored([True] * 10)
    same = of.tokens.copy()
    other = same.copy()
    other[3] += 1

    def context(prompt: np.ndarray, at: int) -> bool:
        (found,) = pages.sources(Match(of, at, 8, 20), prompt)
        return found.same_context

    assert context(same, 8)
    assert not context(other, 8)
    assert not context(same, 9)


@given(st.lists(st.booleans(), max_size=PAGES - 1))
def test_leading_pages_end_at_the_first_that_is_gone(present: list[bool]) -> None:
    pages, of = stored(present)
    expected = present.index(False) if False in present else len(present)
    assert pages.leading(of.block_hashes) == expected
    assert pages.alive(of) == any(present)


def test_held_pages_are_not_handed_out_and_come_back() -> None:
    pages, of = stored([True] * 10)
    assert pages.hold("r", [1, 2, 3, 3, 2], needed=5)
    assert pages.held == 3
    taken = {block.block_id for block in pages.pool.get_new_blocks(PAGES - 1 - 3)}
    assert taken.isdisjoint({1, 2, 3})
    pages.release("r")
    assert pages.held == 0
    assert pages.leading(of.block_hashes) == 3


def test_nothing_is_held_when_too_little_would_stay_free() -> None:
    pages, _ = stored([True] * 10)
    free = pages.pool.get_num_free_blocks()
    assert not pages.hold("r", [1, 2, 3], needed=free - 2)
    assert pages.held == 0
    assert pages.pool.get_num_free_blocks() == free
    assert pages.hold("r", [1, 2, 3], needed=free - 3)


def test_two_requests_may_hold_the_same_page() -> None:
    pages, _ = stored([True] * 10)
    assert pages.hold("a", [1, 2], needed=0)
    assert pages.hold("b", [2, 3], needed=0)
    pages.release("a")
    assert [pages.pool.blocks[page].ref_cnt for page in (1, 2, 3)] == [0, 1, 1]
    pages.release("b")
    pages.release("b")  # twice is once
    assert [pages.pool.blocks[page].ref_cnt for page in (1, 2, 3)] == [0, 0, 0]


def test_one_request_holds_once() -> None:
    pages, _ = stored([True] * 10)
    pages.hold("a", [1], needed=0)
    with pytest.raises(AssertionError, match="held already"):
        pages.hold("a", [2], needed=0)


def test_evicted_pages_are_not_found_but_stay_with_who_holds_them() -> None:
    pages, of = stored([True] * 4)
    pages.hold("a", [2], needed=0)
    pages.evict([2, 3])
    assert [pages.lookup(block_hash) is not None for block_hash in of.block_hashes] == [
        True,
        False,
        False,
        True,
    ]
    assert pages.pool.blocks[2].ref_cnt == 1
