# SPDX-License-Identifier: Apache-2.0
"""`SequenceIndex.leading`: a conversation finds its own earlier turn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_reference import approximate, store

from kvcomm_vllm.scheduler.index import SequenceIndex, window_search
from kvcomm_vllm.scheduler.index.rolling_hash import RollingHash

W = 4


def common(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@st.composite
def families(draw) -> tuple[list[list[int]], list[int]]:
    """Texts that begin alike to different depths."""
    token = st.integers(0, 2)
    trunk = draw(st.lists(token, min_size=8, max_size=40))
    texts = []
    for _ in range(draw(st.integers(1, 6))):
        depth = draw(st.integers(0, len(trunk)))
        texts.append(trunk[:depth] + draw(st.lists(token, max_size=16)))
    return texts, trunk[: draw(st.integers(0, len(trunk)))] + draw(st.lists(token, max_size=8))


@given(
    families(),
    st.lists(st.tuples(st.booleans(), st.one_of(st.none(), st.integers(0, 30))), min_size=6),
    st.sets(st.integers(0, 5)),
    st.sampled_from([0, 1, 2, 3, 64]),
)
@settings(max_examples=200, deadline=None)
def test_the_longest_common_beginning_is_found(family, kinds, refused, hash_bits):
    texts, prompt = family
    with pytest.MonkeyPatch.context() as patch:
        strong, mask = RollingHash.prefixes, np.uint64((1 << hash_bits) - 1)
        patch.setattr(RollingHash, "prefixes", lambda *args: strong(*args) & mask)
        index = SequenceIndex(4, window_tokens=W, max_sequences=64, max_tokens=1 << 12)
        sequences = [
            store(index, text, ready=ready, first_approximate=limit)
            for text, (ready, limit) in zip(texts, kinds, strict=False)
        ]
        found = index.leading(b"model", np.array(prompt, np.int32), lambda s: s.id not in refused)

    def rank(s):
        length = common(prompt, s.tokens.tolist())
        return length, s.ready, not approximate(s, length), s.id

    best = max((s for s in sequences if s.id not in refused), key=rank, default=None)
    if best is None or rank(best)[0] < W:
        assert found is None
    else:
        assert found is not None
        assert (found.prompt_start, found.sequence_start) == (0, 0)
        assert (found.length, found.sequence.id) == (rank(best)[0], best.id)


def test_a_conversation_of_common_pieces_finds_its_own_turn():
    """Every window of the turn is stored by many newer sequences, only their order is its own."""
    rng = np.random.default_rng(3)
    index = SequenceIndex(16, max_tokens=1 << 16)
    pieces = [rng.integers(0, 50_000, 64).tolist() for _ in range(3)]
    turn = store(index, [t for piece in pieces for t in piece])
    for _ in range(3 * window_search.CANDIDATES):
        store(index, [t for piece in reversed(pieces) for t in piece])
        store(index, pieces[1] + pieces[0])
    prompt = np.concatenate([turn.tokens, rng.integers(0, 50_000, 40)]).astype(np.int32)
    found = index.leading(b"model", prompt)
    assert found is not None
    assert (found.sequence.id, found.length) == (turn.id, len(turn.tokens))


def test_equal_text_elsewhere_or_of_another_tenant_is_no_leading_match():
    index = SequenceIndex(16, max_tokens=1 << 12)
    text = list(range(64))
    store(index, [99] * 16 + text)
    store(index, text, namespace=b"other tenant")
    assert index.leading(b"model", np.array(text, np.int32)) is None


def test_a_colliding_longer_sequence_does_not_hide_the_longest_match(monkeypatch):
    """Prefixes of equal length share a key: only the texts tell which sequence begins alike."""
    monkeypatch.setattr(
        RollingHash,
        "prefixes",
        lambda self, sums, seed: np.arange((len(sums) - 1) // self.window_tokens, dtype=np.uint64),
    )
    index = SequenceIndex(4, window_tokens=W, max_tokens=1 << 12)
    text = list(range(16))
    longest = store(index, text[:12])
    store(index, text[:4] + [99] * 12)
    found = index.leading(b"model", np.array(text, np.int32))
    assert found is not None
    assert (found.sequence.id, found.length) == (longest.id, 12)
