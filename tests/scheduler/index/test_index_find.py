# SPDX-License-Identifier: Apache-2.0
"""`SequenceIndex.find`: complete, verified, maximal, in order, and only what the caller accepts."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_reference import check_equal_text, expected, store, summary

from kvcomm_vllm.scheduler.index import Sequence, SequenceIndex, window_search
from kvcomm_vllm.scheduler.index.rolling_hash import RollingHash

W = 4


def small_index(block_size: int = 4) -> SequenceIndex:
    return SequenceIndex(block_size, window_tokens=W, max_sequences=64, max_tokens=1 << 14)


def find(index: SequenceIndex, prompt: list[int], start: int = 0, min_length: int = W, **options):
    return index.find(b"model", np.array(prompt, np.int32), start, min_length, **options)


@contextmanager
def weak_hash(bits: int) -> Iterator[None]:
    """Keep `bits` bits of every window key, so that different windows share keys."""
    with pytest.MonkeyPatch.context() as patch:
        strong, mask = RollingHash.windows, np.uint64((1 << bits) - 1)
        patch.setattr(RollingHash, "windows", lambda *args: strong(*args) & mask)
        yield


@pytest.fixture
def unbounded(monkeypatch):
    """Look at every stored window, so that the promises hold without exception."""
    for name in ("CANDIDATES", "MAX_STEPS", "MAX_REFUSED", "MAX_COMPLETED", "MAX_FAILED"):
        monkeypatch.setattr(window_search, name, 120)


@st.composite
def texts(draw) -> tuple[list[list[int]], list[int]]:
    """Stored texts and a prompt woven from them; few distinct tokens make chance matches common."""
    alphabet = draw(st.integers(1, 6))
    token = st.integers(0, alphabet - 1)
    stored = draw(st.lists(st.lists(token, min_size=0, max_size=40), min_size=1, max_size=5))
    prompt: list[int] = draw(st.lists(token, max_size=6))
    for _ in range(draw(st.integers(0, 4))):
        source = draw(st.sampled_from(stored))
        begin = draw(st.integers(0, len(source)))
        prompt += source[begin : begin + draw(st.integers(0, 40))]
        prompt += draw(st.lists(token, max_size=5))
    return stored, prompt


@st.composite
def traits(draw) -> dict[str, object]:
    limit = draw(st.one_of(st.none(), st.integers(0, 40)))
    return {"ready": draw(st.booleans()), "first_approximate": limit}


@pytest.mark.usefixtures("unbounded")
class TestAgainstLoops:
    @given(
        texts(),
        st.sampled_from([3, 4, 6, 8]),
        st.lists(traits(), min_size=5, max_size=5),
        st.integers(0, 12),
        st.integers(1, 12),
    )
    @settings(max_examples=200, deadline=None)
    def test_every_match_is_found_and_the_best_is_chosen(
        self, given_texts, block_size, kinds, start, min_length
    ):
        stored, prompt = given_texts
        index = small_index(block_size)
        sequences = [store(index, t, **k) for t, k in zip(stored, kinds, strict=False)]
        found = find(index, prompt, start, min_length)
        check_equal_text(found, prompt)
        assert summary(found) == expected(sequences, prompt, start, min_length, W)

    @given(texts(), st.sets(st.integers(0, 4)))
    @settings(max_examples=150, deadline=None)
    def test_refused_sequences_are_as_good_as_absent(self, given_texts, refused):
        stored, prompt = given_texts
        index = small_index()
        sequences = [store(index, text) for text in stored]
        asked: list[int] = []

        def accept(sequence: Sequence) -> bool:
            asked.append(sequence.id)
            return sequence.id not in refused

        found = find(index, prompt, accept=accept)
        allowed = [s for s in sequences if s.id not in refused]
        assert summary(found) == expected(allowed, prompt, 0, W, W)
        assert len(asked) == len(set(asked))

    @given(texts(), st.lists(st.booleans(), min_size=5, max_size=5), st.sampled_from([0, 64]))
    @settings(max_examples=100, deadline=None)
    def test_namespaces_never_mix(self, given_texts, foreign, hash_bits):
        stored, prompt = given_texts
        own = []
        with weak_hash(hash_bits):
            index = small_index()
            for text, other in zip(stored, foreign, strict=False):
                sequence = store(index, text, namespace=b"other tenant" if other else b"model")
                if not other:
                    own.append(sequence)
            found = find(index, prompt)
        assert summary(found) == expected(own, prompt, 0, W, W)

    @given(texts(), st.integers(0, 2))
    @settings(max_examples=150, deadline=None)
    def test_hash_collisions_change_nothing(self, given_texts, hash_bits):
        stored, prompt = given_texts
        with weak_hash(hash_bits):
            index = small_index()
            sequences = [store(index, text) for text in stored]
            found = find(index, prompt)
        check_equal_text(found, prompt)
        assert summary(found) == expected(sequences, prompt, 0, W, W)


@given(texts(), st.integers(1, 10))
@settings(max_examples=200, deadline=None)
def test_matches_are_maximal_even_where_candidates_are_cut_short(given_texts, min_length):
    stored, prompt = given_texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_search, "CANDIDATES", 1)
        patch.setattr(window_search, "MAX_COMPLETED", 0)
        index = small_index()
        for text in stored:
            store(index, text)
        found = find(index, prompt, 0, min_length)
    check_equal_text(found, prompt)
    place = 0
    for m in found:
        assert m.length >= min_length
        tokens, end = m.sequence.tokens, m.prompt_start + m.length
        stop = m.sequence_start + m.length
        assert end == len(prompt) or stop == len(tokens) or prompt[end] != tokens[stop]
        before, source = m.prompt_start - 1, m.sequence_start - 1
        assert before < place or source < 0 or prompt[before] != tokens[source]
        place = end


def test_text_of_two_windows_less_a_token_is_found_wherever_it_stands():
    w = 16
    rng = np.random.default_rng(1)
    index = SequenceIndex(16, window_tokens=w, max_tokens=1 << 16)
    source = store(index, rng.integers(0, 50_000, 160).tolist())
    for offset in range(160 - (2 * w - 1)):
        shared = source.tokens[offset : offset + 2 * w - 1]
        prompt = np.concatenate([[-5] * (offset % 7), shared, [-6] * 3]).astype(np.int32)
        assert summary(index.find(b"model", prompt, 0, 2 * w - 1)) == [
            (offset % 7, 2 * w - 1, source.id)
        ]


def test_common_boilerplate_hides_no_sequence():
    """Thousands share a system prompt, an old one shares what follows too: one whole match."""
    rng = np.random.default_rng(2)
    index = SequenceIndex(16, max_sequences=2000, max_tokens=1 << 20)
    system = rng.integers(0, 50_000, 200).tolist()
    sequences = [store(index, system + rng.integers(0, 50_000, 88).tolist()) for _ in range(2000)]
    old = sequences[3]
    asked: list[int] = []

    def accept(sequence: Sequence) -> bool:
        asked.append(sequence.id)
        return True

    prompt = np.concatenate([old.tokens, rng.integers(0, 50_000, 100)]).astype(np.int32)
    assert summary(index.find(b"model", prompt, 0, 32, accept)) == [(0, 288, old.id)]
    assert len(asked) < 40
    moved = np.concatenate([rng.integers(0, 50_000, 7), old.tokens]).astype(np.int32)
    assert summary(index.find(b"model", moved, 0, 32)) == [(7, 288, old.id)]


def test_sequences_still_prefilling_do_not_hide_ready_ones():
    index = SequenceIndex(16, max_tokens=1 << 16)
    text = list(range(64))
    ready = store(index, text)
    for _ in range(3 * window_search.CANDIDATES):
        store(index, text, ready=False)
    assert summary(find(index, text, accept=lambda s: s.ready)) == [(0, 64, ready.id)]
    assert summary(find(index, text)) == [(0, 64, ready.id)]


@pytest.mark.parametrize("period", [1, 2, 3, 7, 16, 24])
def test_periodic_text_is_covered_by_few_matches(period):
    index = SequenceIndex(16, max_tokens=1 << 16)
    for length in (512, 1024, 512):
        store(index, [i % period for i in range(length)])
    prompt = [i % period for i in range(8192)]
    found = find(index, prompt, 0, 64)
    check_equal_text(found, prompt)
    # a source begins a period late at worst; what is left at the end may be too short to be wanted
    assert sum(m.length for m in found) > 8192 - 64
    assert len(found) <= 8192 // (512 - period) + 1


@pytest.mark.parametrize("prompt", [[], [1], [1] * 15])
def test_prompts_shorter_than_a_window_match_nothing(prompt):
    index = SequenceIndex(16, max_tokens=1 << 12)
    store(index, [1] * 64)
    assert find(index, prompt, 0, 1) == []
    assert index.leading(b"model", np.array(prompt, np.int32)) is None


def test_nothing_before_start_is_matched():
    index = SequenceIndex(16, max_tokens=1 << 12)
    source = store(index, list(range(64)))
    assert summary(find(index, list(range(64)), 10, 16)) == [(10, 54, source.id)]
    assert find(index, list(range(64)), 64, 1) == []
    assert find(index, list(range(64)), 100, 1) == []


def test_of_equal_runs_ready_then_exact_then_new_is_chosen():
    index = SequenceIndex(16, max_tokens=1 << 12)
    text = list(range(64))
    exact_behind = store(index, text, first_approximate=64)
    assert summary(find(index, text)) == [(0, 64, exact_behind.id)]
    store(index, text, first_approximate=48)
    assert summary(find(index, text)) == [(0, 64, exact_behind.id)]
    newer = store(index, text)
    store(index, text, ready=False)
    assert summary(find(index, text)) == [(0, 64, newer.id)]
