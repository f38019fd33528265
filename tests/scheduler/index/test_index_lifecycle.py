# SPDX-License-Identifier: Apache-2.0
"""Sequences come, grow and go; the index always answers for exactly those that it holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_reference import blocks_of, expected, store, summary

from kvcomm_vllm.scheduler.index import Sequence, SequenceIndex, window_search

W = 4
PROMPT = [0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1]


def find(
    index: SequenceIndex, prompt: list[int], min_length: int = W
) -> list[tuple[int, int, int]]:
    return summary(index.find(b"model", np.array(prompt, np.int32), 0, min_length))


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["add", "add", "add", "extend", "extend", "drop", "touch", "ready", "clear"]
        ),
        st.integers(0, 7),
        st.lists(st.integers(0, 1), max_size=24),
    ),
    max_size=30,
)


@given(OPERATIONS, st.sampled_from([3, 4, 6]))
@settings(max_examples=150, deadline=None)
def test_any_history_leaves_the_index_of_what_is_stored(operations, block_size):
    """At most 5 sequences and 60 tokens; a model in plain Python agrees after every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_search, "CANDIDATES", 120)
        patch.setattr(window_search, "MAX_STEPS", 120)
        index = SequenceIndex(block_size, window_tokens=W, max_sequences=5, max_tokens=60)
        model: list[Sequence] = []  # least recently used first
        for name, which, text in operations:
            chosen = model[which % len(model)] if model else None
            if name == "add":
                model.append(store(index, text, ready=False, owner=f"{which}-{len(text)}-{text}"))
                if model[-1] in model[:-1]:  # the same owner and text again
                    model.remove(model[-1])
            elif name == "clear":
                if which == 0:
                    index.clear()
                    model.clear()
            elif chosen is not None:
                if name == "extend":
                    grown = chosen.tokens.tolist() + text
                    index.extend(chosen, *blocks_of(index, grown))
                elif name == "drop":
                    index.drop(chosen)
                    model.remove(chosen)
                elif name == "ready":
                    index.mark_ready(chosen)
                    assert chosen.ready
                if name in ("extend", "touch"):
                    index.touch(chosen)
                    model.remove(chosen)
                    model.append(chosen)
            while len(model) > 5 or sum(len(s.tokens) for s in model) > 60:
                model.pop(0)
            assert len(index) == len(model)
            assert all(s in index for s in model)
            assert index.oldest() is (model[0] if model else None)
            assert index.num_tokens == sum(len(s.tokens) for s in model)
            assert find(index, PROMPT) == expected(model, PROMPT, 0, W, W)
        index.clear()
        assert index._store.free == 60 // W + 5


def test_extend_makes_the_output_findable_and_keeps_the_prompt():
    index = SequenceIndex(16, max_tokens=1 << 12)
    whole = list(range(96))
    sequence = store(index, whole[:32])
    assert find(index, whole[40:96], 16) == []
    index.extend(sequence, *blocks_of(index, whole))
    assert find(index, whole[40:96], 16) == [(0, 56, sequence.id)]
    assert find(index, whole, 16) == [(0, 96, sequence.id)]
    assert len(sequence.block_hashes) == 6


def test_extend_refuses_another_beginning_and_ignores_the_dropped():
    index = SequenceIndex(16, max_tokens=1 << 12)
    sequence = store(index, list(range(32)))
    with pytest.raises(ValueError, match="do not begin with"):
        index.extend(sequence, *blocks_of(index, [7] * 48))
    with pytest.raises(ValueError, match="do not begin with"):
        index.extend(sequence, *blocks_of(index, list(range(16))))
    index.drop(sequence)
    index.extend(sequence, *blocks_of(index, list(range(48))))
    assert len(index) == 0
    assert find(index, list(range(48))) == []


def test_the_same_owner_grows_its_sequence_and_others_keep_their_own():
    index = SequenceIndex(16, max_tokens=1 << 12)
    first = store(index, list(range(32)), owner="a", ready=False)
    assert store(index, list(range(64)), owner="a", first_approximate=48) is first
    assert (len(first.tokens), first.ready, first.first_approximate) == (64, True, 48)
    other = store(index, list(range(64)), owner="b")
    another_text = store(index, [5] * 64, owner="a")
    another_tenant = store(index, list(range(96)), owner="b", namespace=b"other tenant")
    assert len({first.id, other.id, another_text.id, another_tenant.id}) == len(index) == 4


def test_dropped_sequences_are_not_found_and_can_be_dropped_twice():
    index = SequenceIndex(16, max_tokens=1 << 12)
    older, newer = store(index, list(range(64))), store(index, list(range(64)))
    index.drop(newer)
    index.drop(newer)
    index.touch(newer)
    assert newer not in index
    assert find(index, list(range(64))) == [(0, 64, older.id)]


def test_the_least_recently_used_sequence_leaves_at_the_cap():
    index = SequenceIndex(16, max_sequences=3, max_tokens=1 << 12)
    a, b, c = (store(index, [i] * 32) for i in range(3))
    index.touch(a)
    d = store(index, [3] * 32)
    assert b not in index
    assert [s in index for s in (a, c, d)] == [True] * 3
    assert index.oldest() is c


def test_tokens_are_bounded_and_one_long_sequence_is_kept_in_part():
    index = SequenceIndex(16, max_tokens=128)
    small = store(index, [1] * 64)
    large = store(index, list(range(1000, 1400)))
    assert small not in index
    assert len(large.tokens) == index.num_tokens == 128
    assert len(large.block_hashes) == 8
    assert find(index, list(range(1000, 1400)), 16) == [(0, 128, large.id)]


def test_what_has_left_makes_room_for_any_number_of_new_sequences():
    rng = np.random.default_rng(4)
    index = SequenceIndex(16, max_sequences=3, max_tokens=256)
    for _ in range(200):
        tokens = rng.integers(0, 50_000, 16 * int(rng.integers(1, 8))).tolist()
        sequence = store(index, tokens)
        assert find(index, tokens, 16) == [(0, len(tokens), sequence.id)]


def test_a_sweep_visits_every_sequence_in_turn():
    index = SequenceIndex(16, max_sequences=8, max_tokens=1 << 12)
    assert index.sweep_candidates(3) == []
    stored = [store(index, [i] * 16) for i in range(5)]
    seen = [s for _ in range(5) for s in index.sweep_candidates(2)]
    assert sorted(s.id for s in seen) == sorted([s.id for s in stored] * 2)
    assert len(index.sweep_candidates(100)) == 5


def test_version_changes_with_every_change_of_content_and_with_nothing_else():
    index = SequenceIndex(16, max_tokens=1 << 12)
    versions = [index.version]

    def changed() -> bool:
        versions.append(index.version)
        return versions[-1] != versions[-2]

    sequence = store(index, list(range(32)), ready=False)
    assert changed()
    index.mark_ready(sequence)
    assert changed()
    index.extend(sequence, *blocks_of(index, list(range(64))))
    assert changed()
    index.touch(sequence)
    find(index, list(range(64)))
    index.sweep_candidates(1)
    assert not changed()
    index.drop(sequence)
    assert changed()
    index.drop(sequence)
    index.clear()
    assert not changed()


def test_stored_tokens_do_not_change_with_the_callers_array():
    index = SequenceIndex(16, max_tokens=1 << 12)
    tokens = np.arange(32, dtype=np.int32)
    sequence = index.add(b"model", tokens, [b"a", b"b"], 32, None, True, "a")
    tokens[:] = 0
    assert find(index, list(range(32))) == [(0, 32, sequence.id)]


@pytest.mark.parametrize("tokens", [0, 17, 33])
def test_tokens_that_do_not_fill_their_blocks_are_refused(tokens):
    index = SequenceIndex(16, max_tokens=1 << 12)
    with pytest.raises(ValueError, match="do not fill 1 blocks of 16"):
        index.add(b"model", np.zeros(tokens, np.int32), [b"a"], 1, None, True, "a")
    assert len(index) == 0


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({"block_size": 0}, "block_size"),
        ({"block_size": 16, "window_tokens": 0}, "window_tokens"),
        ({"block_size": 16, "max_sequences": 0}, "max_sequences"),
        ({"block_size": 16, "max_tokens": 15}, "max_tokens"),
    ],
)
def test_impossible_sizes_are_refused_by_name(sizes, name):
    with pytest.raises(ValueError, match=name):
        SequenceIndex(**sizes)
