# SPDX-License-Identifier: Apache-2.0
"""Near copies: text of a prompt that is stored in another rendering, and what it is a copy of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from kvcomm_vllm.scheduler.index import I32, U64, RollingHash, Sequence
from kvcomm_vllm.scheduler.near import (
    MOST_SEQUENCES,
    MOST_TOKENS,
    SHINGLE,
    Near,
    near,
)

MARGIN = 2  # a copy takes up to so many times the tokens of the other rendering
_ROLL = RollingHash(SHINGLE)
_NO_SEED = np.uint64(0)


@dataclass(frozen=True)
class Copy:
    """``start..end`` of a prompt has ``share`` of its pieces in common with ``original``."""

    start: int
    end: int
    share: float
    original: I32


def copies(tokens: I32, known: NDArray[np.bool_], stored: Listing[Sequence]) -> list[Copy]:
    """Stretches of a prompt without a ``known`` token that sequences hold in another rendering.

    Args:
        stored: what is looked at, the most important first; as much of it as the product looks at.
    """
    found = near(tokens, known, (sequence.tokens for sequence in stored))
    return [_copy(tokens, stretch, stored) for stretch in found]


def _copy(tokens: I32, stretch: Near, stored: Iterable[Sequence]) -> Copy:
    own = np.unique(_shingles(tokens[stretch.start : stretch.end]))
    width = MARGIN * (stretch.end - stretch.start)
    most, original = 0, np.zeros(0, np.int32)
    for text in _looked_at(stored):
        places = np.flatnonzero(np.isin(_shingles(text), own))
        if len(places) <= most:
            continue
        inside = np.searchsorted(places, places + width) - np.arange(len(places))
        first = int(inside.argmax())
        if inside[first] > most:
            most = int(inside[first])
            original = text[places[first] : places[first + most - 1] + SHINGLE]
    return Copy(stretch.start, stretch.end, stretch.share, original)


def _looked_at(stored: Iterable[Sequence]) -> Iterator[I32]:
    left = MOST_TOKENS
    for sequence in islice(stored, MOST_SEQUENCES):
        yield sequence.tokens[:left]
        left -= len(sequence.tokens)
        if left <= 0:
            return


def _shingles(tokens: I32) -> U64:
    return _ROLL.windows(_ROLL.sums(np.ascontiguousarray(tokens, np.int32)), _NO_SEED)
