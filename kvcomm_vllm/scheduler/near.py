# SPDX-License-Identifier: Apache-2.0
"""Near matches: parts of a prompt that earlier requests hold in another rendering.

Text that was encoded again (as a JSON string, with line numbers, wrapped, with CRLF) has other
tokens in every line, so no run of equal tokens is long enough to be reused. Its short pieces are
still the same. This tells a user who asks (hint ``explain``); it decides nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.scheduler.index import I32, U64, RollingHash, SequenceIndex
from kvcomm_vllm.scheduler.state import RequestState

Bools = NDArray[np.bool_]

SHINGLE = 4  # tokens compared in one piece
MOST_SEQUENCES = 256  # stored sequences looked at, the most recently used ones,
MOST_TOKENS = 1 << 18  # until they have this many tokens together
MOST_PROMPT = 1 << 14  # prompt tokens looked at, the first ones
EXAMINED = 8  # of those sequences, the ones that share most
LEAST_TOKENS = 48  # of a stretch: what a span needs behind its seam
LEAST_KINDS = 16  # different shingles it must share: blanks and rules are no text
LEAST_SHARE = 0.35  # of a stretch's shingles that one sequence has;
MOST_SHARE = 0.95  # with more of them it is an exact copy, which the index may overlook if short
STRETCHES = 8  # at most
RE_ENCODED = "re-encoded"
_TABLE_BITS = 20
_ROLL = RollingHash(SHINGLE)


@dataclass(frozen=True, slots=True)
class Near:
    """``tokens[start:end]`` of a prompt, of whose shingles one sequence has ``share``."""

    start: int
    end: int
    share: float

    def listed(self) -> list[int | float | str]:
        """``[start, end, share, kind]``; the kind is a guess."""
        return [self.start, self.end, round(self.share, 2), RE_ENCODED]


def may_explain(state: RequestState, config: KVCommConfig) -> bool:
    """Whether this request may be told of near matches: wherever a full report may be."""
    return state.trusted and config.report in ("auto", "full")


def note(state: RequestState, config: KVCommConfig, index: SequenceIndex) -> None:
    """Put what is near into the request's report, if it asks and may be told."""
    wanted = state.hints.explain and state.limits is not None
    if wanted and may_explain(state, config):
        state.near = [stretch.listed() for stretch in explain(state, index)]


def explain(state: RequestState, index: SequenceIndex) -> list[Near]:
    """The longest stretches of the prompt that are neither in the local hit nor in any match, but
    mostly in one sequence of the same tenant.
    """
    tokens = state.tokens()[: state.request.num_prompt_tokens]
    assert state.limits is not None
    matches = index.find(
        state.namespace,
        tokens,
        state.local,
        min(state.limits.min_span_tokens, LEAST_TOKENS),  # too short to be reused is exact, too
        lambda sequence: sequence.owner != state.id,
    )
    known = np.zeros(len(tokens), np.bool_)
    known[: state.local] = True
    for match in matches:
        known[match.prompt_start : match.prompt_start + match.length] = True
    stored = index.recent(state.namespace)
    return near(tokens, known, (s.tokens for s in stored if s.owner != state.id))


def near(tokens: I32, known: Bools, texts: Iterable[I32]) -> list[Near]:
    """Stretches without a ``known`` token, the longest first.

    Args:
        tokens: int32 [n], the prompt.
        known: [n], tokens that are matched or computed already.
        texts: int32 [m] each, where to look; what counts most comes first.
    """
    shingles = shingle_keys(tokens[:MOST_PROMPT])
    free = _free(known[:MOST_PROMPT])
    kinds, kind_at = np.unique(shingles[free], return_inverse=True)
    shared = _shared(kinds, list(bounded(texts)))
    hits = np.zeros((len(shared), len(shingles)), np.bool_)
    hits[:, free] = shared[:, kind_at]
    found: list[Near] = []
    for _ in range(STRETCHES):
        best, row = _best(hits, free)
        if best.end - best.start < LEAST_TOKENS:
            break
        own = slice(best.start, best.end - SHINGLE + 1)
        shared_kinds = len(np.unique(shingles[own][hits[row, own]]))
        if shared_kinds >= LEAST_KINDS and best.share <= MOST_SHARE:
            found.append(best)
        free[max(0, best.start - SHINGLE + 1) : best.end] = False
    return sorted(found, key=lambda stretch: stretch.start - stretch.end)


def bounded(texts: Iterable[I32]) -> Iterator[I32]:
    """The first texts, the last of them cut, that are no longer than allowed."""
    left = MOST_TOKENS
    for text in itertools.islice(texts, MOST_SEQUENCES):
        if left <= 0:
            break
        yield text[:left]
        left -= len(text)


def shingle_keys(tokens: I32) -> U64:
    """A key for the shingle that starts at each token: [max(0, n - SHINGLE + 1)]."""
    return _ROLL.grams(tokens)


def _free(known: Bools) -> Bools:
    """The shingles that no known token is part of."""
    before = np.concatenate([[0], np.cumsum(known)])
    free: Bools = before[SHINGLE:] == before[:-SHINGLE]
    return free


def _shared(kinds: U64, texts: list[I32]) -> Bools:
    """Which ``kinds`` stand in the texts that have most of them: [EXAMINED or fewer, kinds]."""
    if not len(kinds) or not texts:
        return np.zeros((0, len(kinds)), np.bool_)
    stored = shingle_keys(np.concatenate(texts))
    asked = np.zeros(1 << _TABLE_BITS, np.bool_)
    asked[_cell(kinds)] = True  # one look dismisses most of what is stored
    places = np.flatnonzero(asked[_cell(stored)])
    kind = np.searchsorted(kinds, stored[places])
    kind[kind == len(kinds)] = 0
    same = kinds[kind] == stored[places]
    ends = np.cumsum([len(text) for text in texts])
    shared = np.zeros((len(texts), len(kinds)), np.bool_)
    shared[np.searchsorted(ends, places[same], side="right"), kind[same]] = True
    return shared[np.argsort(-shared.sum(axis=1), kind="stable")[:EXAMINED]]


def _cell(keys: U64) -> U64:
    return keys >> np.uint64(64 - _TABLE_BITS)


def _best(hits: Bools, free: Bools) -> tuple[Near, int]:
    """The stretch with most hits beyond the least share, and its row; an empty one without any."""
    if not hits.size:
        return Near(0, 0, 0.0), 0
    worth = np.where(hits, 1 - LEAST_SHARE, -LEAST_SHARE)
    worth[:, ~free] = -hits.shape[1]  # no stretch reaches across what is known
    sums = np.zeros((len(hits), hits.shape[1] + 1))
    np.cumsum(worth, axis=1, out=sums[:, 1:])
    gains = sums - np.minimum.accumulate(sums, axis=1)
    row, end = (int(place) for place in np.unravel_index(gains.argmax(), gains.shape))
    if gains[row, end] <= 0:
        return Near(0, 0, 0.0), row
    start = int(sums[row, : end + 1].argmin())
    return Near(start, end + SHINGLE - 1, float(hits[row, start:end].mean())), row
