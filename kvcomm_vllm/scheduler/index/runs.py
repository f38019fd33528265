# SPDX-License-Identifier: Apache-2.0
"""From verified window hits to runs of equal text, and the runs that are worth choosing from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcomm_vllm.scheduler.index.rolling_hash import I32
from kvcomm_vllm.scheduler.index.window_store import WindowStore

I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(slots=True)
class Runs:
    """Runs of equal tokens: text[begin:end] equals sequence `row` from `begin - diagonal`.

    `open` runs may reach further than known: a neighbouring window is equal, yet was not among the
    hits, because its key has more nodes than are examined.
    """

    row: I64
    diagonal: I64
    begin: I64
    end: I64
    open: Bools

    def __len__(self) -> int:
        return len(self.row)

    def select(self, which: NDArray[np.intp] | Bools) -> Runs:
        """Those given, in the given order."""
        return Runs(
            self.row[which],
            self.diagonal[which],
            self.begin[which],
            self.end[which],
            self.open[which],
        )


def join_hits(store: WindowStore, views: I32, positions: I64, nodes: I32) -> Runs:
    """Join hits into runs, extended by what stands before their first and after their last.

    Args:
        store: where the nodes live.
        views: windows of the text, with w tokens that equal nothing on both sides: [n + w + 1, w].
        positions: text position of each hit.
        nodes: the stored window that equals the text there.
    """
    w = views.shape[1]
    diagonals = positions - store.offset[nodes]
    rows = store.row[nodes].astype(np.int64)
    # (row, diagonal, position) in one integer: one fast sort, and hits w apart differ by exactly
    # w. A spare bit between the fields keeps positions of neighbouring diagonals further apart than
    # that.
    position_bits = (len(views) + w).bit_length() + 1
    lowest = int(diagonals.min()) if len(diagonals) else 0
    diagonal_bits = (len(views) - lowest).bit_length()
    packed = (((rows << diagonal_bits) + (diagonals - lowest)) << position_bits) + positions
    order = np.argsort(packed)
    breaks = np.flatnonzero(np.diff(packed[order]) != w)
    first = order[np.concatenate([[0], breaks + 1])] if len(order) else order
    last = order[np.concatenate([breaks, [len(order) - 1]])] if len(order) else order

    # In `views` a window of the text at p stands at p + w: the padding comes first.
    back = _equal_tail(store.equal(store.before[nodes[first]], views[positions[first]]))
    forward = _equal_head(store.equal(store.after[nodes[last]], views[positions[last] + 2 * w]))
    return Runs(
        row=rows[first],
        diagonal=diagonals[first],
        begin=positions[first] - back,
        end=positions[last] + w + forward,
        open=(back == w) | (forward == w),
    )


def front(runs: Runs, *preference: NDArray[np.generic]) -> Runs:
    """Runs that no other run contains, by begin; of runs with the same extent the preferred one.

    Both begin and end then grow strictly, so the best run at any place is found by bisection.

    Args:
        runs: any runs.
        preference: keys per run, the first one weighs most; larger is better.
    """
    if not len(runs):
        return runs
    ranks = tuple(-key.astype(np.int64) for key in reversed(preference))
    order = np.lexsort((*ranks, -runs.end, runs.begin))
    ends = runs.end[order]
    reached = np.maximum.accumulate(ends)
    leads = np.ones(len(order), np.bool_)
    leads[1:] = ends[1:] > reached[:-1]
    return runs.select(order[leads])


def _equal_head(equal: Bools) -> I64:
    """Leading equal tokens per row."""
    count = np.argmin(equal, axis=1)
    return np.where(equal[:, 0] & (count == 0), equal.shape[1], count)


def _equal_tail(equal: Bools) -> I64:
    """Trailing equal tokens per row."""
    return _equal_head(equal[:, ::-1])
