# SPDX-License-Identifier: Apache-2.0
"""Taint: a private hash chain is exact before its first link, private to its end, reversible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from kvcomm_vllm.scheduler.taint import Taint

SIZE = 4


@pytest.fixture(autouse=True, scope="module")
def hashing() -> None:
    init_none_hash(sha256)


def request(tokens: list[int], salt: str | None = None) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=9),
        pooling_params=None,
        cache_salt=salt,
        block_hasher=get_request_block_hasher(SIZE, sha256),
    )


def exact_hashes(tokens: list[int]) -> list[bytes]:
    return list(request(tokens).block_hashes)


token_lists = st.lists(st.integers(0, 9), min_size=1, max_size=60)
steps = st.lists(st.one_of(st.integers(0, 20), st.none()), min_size=1, max_size=5)


@given(token_lists, st.integers(0, 20), token_lists)
def test_hashes_are_exact_before_the_first_private_block_and_never_after(
    tokens: list[int], first: int, answer: list[int]
) -> None:
    """Also where the block fills up only later, with tokens that are generated one by one."""
    tainted = request(tokens)
    Taint(tainted, b"secret").apply(first)
    for token in answer:
        tainted.append_output_token_ids(token)
    exact = exact_hashes([*tokens, *answer])
    assert len(tainted.block_hashes) == len(exact)
    assert tainted.block_hashes[:first] == exact[:first]
    assert not set(tainted.block_hashes[first:]) & set(exact)


@given(token_lists, st.integers(0, 20), token_lists)
def test_hashes_do_not_depend_on_when_tokens_arrive(
    tokens: list[int], first: int, answer: list[int]
) -> None:
    """A preempted request must find its own pages, whatever was known when they were hashed."""
    slow = request(tokens)
    Taint(slow, b"secret").apply(first)
    for token in answer:
        slow.append_output_token_ids(token)
    fast = request([*tokens, *answer])
    Taint(fast, b"secret").apply(first)
    assert slow.block_hashes == fast.block_hashes


@given(token_lists, steps)
def test_any_history_ends_where_its_last_step_says(
    tokens: list[int], history: list[int | None]
) -> None:
    changed = request(tokens)
    taint = Taint(changed, b"secret")
    for first in history:
        if first is None:
            taint.restore()
        else:
            taint.apply(first)
    last = history[-1]
    assert taint.first_block == last
    if last is None:
        assert changed.block_hashes == exact_hashes(tokens)
    else:
        once = request(tokens)
        Taint(once, b"secret").apply(last)
        assert changed.block_hashes == once.block_hashes
    changed.append_output_token_ids([1] * 9)
    assert len(changed.block_hashes) == (len(tokens) + 9) // SIZE


@given(token_lists, st.integers(0, 10))
def test_two_secrets_share_no_private_block(tokens: list[int], first: int) -> None:
    one, two = request(tokens), request(tokens)
    Taint(one, b"one").apply(first)
    Taint(two, b"two").apply(first)
    assert one.block_hashes[:first] == two.block_hashes[:first]
    assert not set(one.block_hashes[first:]) & set(two.block_hashes[first:])


@given(token_lists, token_lists, st.integers(0, 10), st.data())
def test_an_adopted_chain_goes_on_as_the_adopter_says_and_can_be_given_back(
    tokens: list[int], more: list[int], first: int, data: st.DataObject
) -> None:
    owner = request(tokens)
    Taint(owner, b"owner").apply(first)
    blocks = data.draw(st.integers(0, len(owner.block_hashes)))
    if blocks <= first:
        return  # nothing private to adopt
    heir = request([*tokens, *more])
    taint = Taint(heir, b"heir")
    taint.adopt(owner.block_hashes[:blocks], first)
    exact = exact_hashes([*tokens, *more])
    assert heir.block_hashes[:blocks] == owner.block_hashes[:blocks]
    assert len(heir.block_hashes) == len(exact)
    assert not set(heir.block_hashes[first:]) & set(exact)
    taint.restore()
    assert heir.block_hashes == exact


@given(token_lists, st.integers(0, 5))
def test_tenants_stay_apart_in_private_chains(tokens: list[int], first: int) -> None:
    red, blue = request(tokens, "red"), request(tokens, "blue")
    Taint(red, b"secret").apply(first)
    Taint(blue, b"secret").apply(first)
    assert not set(red.block_hashes) & set(blue.block_hashes)
