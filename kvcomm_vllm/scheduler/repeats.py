# SPDX-License-Identifier: Apache-2.0
"""Repeats: which tokens of a text say or continue something that stands earlier in it.

A model completes what it has read before: a token whose last few tokens occurred earlier attends to
what followed them there (induction heads, arXiv 2209.11895), and its KV keeps what it found. So KV
fits a new context as far as the same tokens are repetitions in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcomm_vllm.scheduler.index import I32, RollingHash

GRAM = 3  # so many tokens in a row are a phrase
WORD, PHRASE = np.uint8(1), np.uint8(2)  # bits of what repeats
Bools = NDArray[np.bool_]
Marks = NDArray[np.uint8]

_HASHING = RollingHash(GRAM)


def repeats(tokens: I32) -> Marks:
    """What stands earlier in the text, too: each token (bit WORD), and the GRAM tokens that end
    there (bit PHRASE): uint8 [n].
    """
    found = _again(tokens) * WORD
    found[GRAM - 1 :] |= _again(_HASHING.grams(tokens)) * PHRASE
    return found


def _again(keys: NDArray[Any]) -> Bools:
    """All but the first of equal ones."""
    found = np.ones(len(keys), np.bool_)
    found[np.unique(keys, return_index=True)[1]] = False
    return found


def precedents(tokens: I32) -> Bools:
    """Tokens that stand where the last one of this text and the next one do: the end of each
    earlier occurrence of the GRAM tokens it ends with, and what followed. In a chat, where each
    earlier answer began: bool [n].
    """
    found = np.zeros(len(tokens), np.bool_)
    grams = _HASHING.grams(tokens)
    if len(grams):
        found[GRAM - 1 : -1] = grams[:-1] == grams[-1]
    return with_the_next(found)


def with_the_next(marks: Bools) -> Bools:
    """Tokens that are marked, and the one behind each: bool [n]."""
    found = marks.copy()
    found[1:] |= marks[:-1]
    return found
