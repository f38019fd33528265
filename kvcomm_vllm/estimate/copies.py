# SPDX-License-Identifier: Apache-2.0
"""Near copies: text of a prompt that is stored in another rendering, and what it is a copy of."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcomm_vllm.scheduler.index import I32, Sequence
from kvcomm_vllm.scheduler.near import SHINGLE, Near, bounded, near, shingle_keys

MARGIN = 2  # a copy takes up to so many times the tokens of the other rendering


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
    own = np.unique(shingle_keys(tokens[stretch.start : stretch.end]))
    width = MARGIN * (stretch.end - stretch.start)
    most, original = 0, np.zeros(0, np.int32)
    for text in bounded(sequence.tokens for sequence in stored):
        places = np.flatnonzero(np.isin(shingle_keys(text), own))
        if len(places) <= most:
            continue
        inside = np.searchsorted(places, places + width) - np.arange(len(places))
        first = int(inside.argmax())
        if inside[first] > most:
            most = int(inside[first])
            original = text[places[first] : places[first + most - 1] + SHINGLE]
    return Copy(stretch.start, stretch.end, stretch.share, original)
