# SPDX-License-Identifier: Apache-2.0
"""How much of a prompt an earlier request had already, at whatever position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 16  # tokens
# Odd 64-bit factors, one per place in a window; sums wrap around. Fixed, so that runs agree.
_FACTORS = np.random.default_rng(0).integers(1, 2**63, WINDOW, dtype=np.uint64) * 2 + 1


@dataclass(frozen=True)
class Repeated:
    """Tokens that lie in a window seen before, and in how many runs: texts that an earlier request
    had one behind the other count once, in another order once each.
    """

    tokens: int
    runs: int


class Repeats:
    """All windows of 16 tokens that one column's requests have contained."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def count(self, tokens: Sequence[int]) -> Repeated:
        """Of a request's prompt."""
        found = np.array([window in self._seen for window in _windows(tokens)], np.int64)
        covered = np.zeros(len(tokens) + 1, np.int64)
        covered[: len(found)] += found
        covered[WINDOW : WINDOW + len(found)] -= found
        # no window over the seam of two texts was seen, unless they have met before
        begins = np.diff(found, prepend=0) == 1
        return Repeated(int(np.count_nonzero(np.cumsum(covered))), int(begins.sum()))

    def add(self, tokens: Sequence[int]) -> None:
        """A request's prompt and answer, one behind the other."""
        self._seen.update(_windows(tokens))


def _windows(tokens: Sequence[int]) -> list[int]:
    """A hash per window, in the order of their starts."""
    if len(tokens) < WINDOW:
        return []
    values = np.asarray(tokens, np.uint64) + np.uint64(1)
    windows = np.lib.stride_tricks.sliding_window_view(values, WINDOW)
    hashes: list[int] = (windows * _FACTORS).sum(axis=1, dtype=np.uint64).tolist()
    return hashes
