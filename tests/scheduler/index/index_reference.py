# SPDX-License-Identifier: Apache-2.0
"""What `SequenceIndex` promises, written as loops: the judge of its tests."""

from collections.abc import Iterable

import numpy as np

from kvcomm_vllm.scheduler.index import Match, Sequence, SequenceIndex

Choice = tuple[int, int, int]  # prompt start, length, sequence id


def store(
    index: SequenceIndex,
    tokens: list[int],
    *,
    namespace: bytes = b"model",
    owner: str | None = None,
    ready: bool = True,
    first_approximate: int | None = None,
) -> Sequence:
    """Add as many whole blocks of `tokens` as there are."""
    kept, hashes = blocks_of(index, tokens)
    owner = f"request-{index.version}" if owner is None else owner
    return index.add(namespace, kept, hashes, len(kept), first_approximate, ready, owner)


def blocks_of(index: SequenceIndex, tokens: list[int]) -> tuple[np.ndarray, list[bytes]]:
    size = index.block_size
    blocks = len(tokens) // size
    kept = np.array(tokens[: blocks * size], np.int32)
    return kept, [kept[: (i + 1) * size].tobytes() for i in range(blocks)]


def runs(
    sequence: Sequence, prompt: list[int], start: int, window: int
) -> Iterable[tuple[int, int, int]]:
    """Maximal equal stretches (begin, end, diagonal) that hold a whole stored window."""
    tokens = sequence.tokens.tolist()
    for diagonal in range(start - len(tokens) + 1, len(prompt)):
        at = max(start, diagonal)
        while at < min(len(prompt), diagonal + len(tokens)):
            begin = at
            while (
                at < len(prompt)
                and at - diagonal < len(tokens)
                and prompt[at] == tokens[at - diagonal]
            ):
                at += 1
            first = -(-(begin - diagonal) // window) * window
            if first + window <= at - diagonal:
                yield begin, at, diagonal
            at = max(at, begin + 1)


def expected(
    sequences: Iterable[Sequence], prompt: list[int], start: int, min_length: int, window: int
) -> list[Choice]:
    """Left to right: earliest begin, then furthest reach, then ready, exact, newest."""
    candidates = [(*run, s) for s in sequences for run in runs(s, prompt, start, window)]
    chosen: list[Choice] = []
    place = start
    while True:
        open_ = [
            (max(begin, place), -end, not s.ready, approximate(s, end - diagonal), -s.id, begin, s)
            for begin, end, diagonal, s in candidates
            if end - max(begin, place) >= min_length
        ]
        if not open_:
            return chosen
        first = min((key[0], key[1]) for key in open_)
        # of runs that reach equally far from here, the one that began first, as the longer context
        begin, end, *_, s = min(
            (k for k in open_ if (k[0], k[1]) == first), key=lambda k: (k[5], *k[2:5])
        )
        chosen.append((begin, -end - begin, s.id))
        place = -end


def approximate(sequence: Sequence, stop: int) -> bool:
    return sequence.first_approximate is not None and stop > sequence.first_approximate


def summary(matches: Iterable[Match]) -> list[Choice]:
    return [(m.prompt_start, m.length, m.sequence.id) for m in matches]


def check_equal_text(matches: Iterable[Match], prompt: list[int]) -> None:
    """Every match holds equal tokens, and none overlaps the one before it."""
    place = 0
    for m in matches:
        source = m.sequence.tokens[m.sequence_start : m.sequence_start + m.length]
        assert source.tolist() == prompt[m.prompt_start : m.prompt_start + m.length]
        assert len(source) == m.length
        assert m.prompt_start >= place
        place = m.prompt_start + m.length
