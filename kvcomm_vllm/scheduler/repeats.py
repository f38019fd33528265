# SPDX-License-Identifier: Apache-2.0
"""Repeats: which tokens of a text continue something that stands earlier in it.

A model completes what it has read before: a token whose last few tokens occurred earlier attends to
what followed them there (induction heads, arXiv 2209.11895), and its KV keeps what it found. So KV
fits a new context as far as the same tokens are repetitions in it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvcomm_vllm.scheduler.index import I32, RollingHash

GRAM = 3  # so many tokens in a row are a repetition
Bools = NDArray[np.bool_]

_HASHING = RollingHash(GRAM)


def repeats(tokens: I32) -> Bools:
    """Whether the GRAM tokens that end at each token stand earlier in the text, too: bool [n]."""
    found = np.zeros(len(tokens), np.bool_)
    grams = _HASHING.grams(tokens)
    if len(grams):
        ends = found[GRAM - 1 :]
        ends[:] = True
        ends[np.unique(grams, return_index=True)[1]] = False
    return found


def precedents(tokens: I32) -> Bools:
    """Tokens that stand where the last one of this text and the next one do: the end of each
    earlier occurrence of the GRAM tokens it ends with, and what followed. In a chat, where each
    earlier answer began: bool [n].
    """
    found = np.zeros(len(tokens), np.bool_)
    grams = _HASHING.grams(tokens)
    if len(grams):
        same = grams[:-1] == grams[-1]
        found[GRAM:] = same
        found[GRAM - 1 : -1] |= same
    return found
