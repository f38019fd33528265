# SPDX-License-Identifier: Apache-2.0
"""Between two borders of a sequence lie so many tokens that nobody guesses them one by one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_reference import blocks_of
from test_index_find import W, texts

from kvcomm_vllm.scheduler.index import Sequence, SequenceIndex
from kvcomm_vllm.scheduler.index.borders import Borders, Lengths, Reach

SECRET, EXACT = Reach(secret=True), Reach(exact=True)


def borders_of(prompt: int, total: int, window: int) -> tuple[Borders, list[int]]:
    """The borders, and where they lie, by asking for each position."""
    places = np.arange(total + 1, dtype=np.int64)
    lengths = Lengths(*(np.full(total + 1, n, np.int64) for n in (prompt, total, total)))
    borders = Borders(window, lengths)
    return borders, [int(p) for p in places[borders.floor(places) == places]]


parts = st.tuples(st.integers(0, 80), st.integers(0, 80), st.integers(1, 16))


@given(parts)
def test_no_two_borders_are_nearer_than_a_window(given_parts: tuple[int, int, int]) -> None:
    prompt, output, window = given_parts
    total = prompt + output
    _, found = borders_of(prompt, total, window)
    assert found[0] == 0
    assert found[-1] == total
    assert prompt in found, "output that is quoted is found from its first token on"
    for before, after in pairwise(found):
        whole_part = (before, after) in ((0, prompt), (prompt, total))
        assert after - before >= window or whole_part
        assert after - before < 2 * window


@given(parts)
def test_floor_and_ceiling_are_the_nearest_borders(given_parts: tuple[int, int, int]) -> None:
    prompt, output, window = given_parts
    total = prompt + output
    borders, found = borders_of(prompt, total, window)
    places = np.arange(total + 1, dtype=np.int64)
    floors, ceilings = borders.floor(places), borders.ceil(places)
    for place in range(total + 1):
        assert floors[place] == max(b for b in found if b <= place)
        assert ceilings[place] == min(b for b in found if b >= place)


def stored(
    index: SequenceIndex, tokens: list[int], prompt: int, exact: int | None = None
) -> Sequence:
    kept, hashes = blocks_of(index, tokens)
    owner = f"request-{index.version}"
    return index.add(b"model", kept, hashes, prompt, exact, True, owner)


@given(texts(), st.integers(0, 40), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_matches_begin_and_end_at_borders(
    given_texts: tuple[list[list[int]], list[int]], prompt_tokens: int, min_length: int
) -> None:
    texts_, prompt = given_texts
    index = SequenceIndex(4, window_tokens=W, max_sequences=64, max_tokens=1 << 14)
    for text in texts_:
        stored(index, text, prompt_tokens)
    place = 0
    for match in index.find(b"model", np.array(prompt, np.int32), 0, min_length, reach=SECRET):
        s = match.sequence
        begin, end = match.sequence_start, match.sequence_start + match.length
        _, found = borders_of(s.num_prompt_tokens, len(s.tokens), W)
        assert end in found
        assert begin in found or match.prompt_start == place  # cut by the match before it
        assert match.length >= min_length
        assert s.tokens[begin:end].tolist() == prompt[match.prompt_start :][: match.length]
        place = match.prompt_start + match.length


@given(texts(), st.lists(st.integers(0, 40), min_size=5, max_size=5), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_exact_matches_are_those_of_sequences_without_their_approximate_ends(
    given_texts: tuple[list[list[int]], list[int]], limits: list[int], min_length: int
) -> None:
    """The same tokens are found as where only the exact parts had been stored."""
    texts_, prompt = given_texts
    index, cut = (
        SequenceIndex(1, window_tokens=W, max_sequences=64, max_tokens=1 << 14) for _ in range(2)
    )
    for text, limit in zip(texts_, limits, strict=False):
        whole = stored(index, text, len(text), exact=limit if limit < len(text) else None)
        assert whole.exact_tokens == min(limit, len(text))
        stored(cut, text[:limit], len(text))
    given_prompt = np.array(prompt, np.int32)
    found = index.find(b"model", given_prompt, 0, min_length, reach=EXACT)
    for match in found:
        assert match.sequence_start + match.length <= match.sequence.exact_tokens
    covered = {p for m in found for p in range(m.prompt_start, m.prompt_start + m.length)}
    wanted = cut.find(b"model", given_prompt, 0, min_length)
    assert covered >= {p for m in wanted for p in range(m.prompt_start, m.prompt_start + m.length)}


@pytest.mark.parametrize("secret_at", range(33, 65))
def test_guessing_a_secret_token_by_token_shows_one_border_at_most(secret_at: int) -> None:
    """Where none lies in the secret all its tokens must be right at once."""
    rng = np.random.default_rng(secret_at)
    secret, window = 4, 16
    for behind in range(2 * window):
        text = rng.integers(0, 9, secret_at + secret + behind).tolist()
        index = SequenceIndex(1, window_tokens=window, max_tokens=1 << 12)
        sequence = stored(index, text, len(text))
        lengths = []
        for right in range(secret + 1):
            guess = [*text[: secret_at + right], 10, 11, 12]
            found = index.find(b"model", np.array(guess, np.int32), 0, window, reach=SECRET)
            lengths.append(sum(match.length for match in found))
        _, borders = borders_of(len(text), len(sequence.tokens), window)
        inside = [b for b in borders if secret_at < b < secret_at + secret]
        assert len(set(lengths[:-1])) == 1 + len(inside)
        assert len(inside) <= 1
