# SPDX-License-Identifier: Apache-2.0
"""The windows of all stored sequences: tokens, places, and tables that find them by key."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvcomm_vllm.scheduler.index.hash_chains import FreeList, HashChains
from kvcomm_vllm.scheduler.index.rolling_hash import I32, U64

NO_TOKEN = np.iinfo(np.int32).min  # fills cells past a sequence's end
OUTSIDE = NO_TOKEN + 1  # surrounds a prompt; differs, so that no end matches another end


class WindowStore:
    """Nodes 1..capacity, each one window of a sequence; node 0 is none.

    A sequence is cut into windows at stride w from its start; what is left at its end gets a node
    that no table knows, so that a match can be extended into it. Tokens lie in one array (`cells`),
    which lets a whole batch of hits be verified by one gather. Memory per node: 4 w (tokens) + 20 +
    twice that of `HashChains`.
    """

    def __init__(self, capacity: int, window_tokens: int) -> None:
        self.cells: I32 = np.zeros((capacity + 1, window_tokens), np.int32)
        self.cells[0] = NO_TOKEN
        self.row: I32 = np.zeros(capacity + 1, np.int32)
        self.offset: I32 = np.zeros(capacity + 1, np.int32)
        self.before: I32 = np.zeros(capacity + 1, np.int32)
        self.after: I32 = np.zeros(capacity + 1, np.int32)
        self.windows = HashChains(capacity)
        self.prefixes = HashChains(capacity)
        self._free = FreeList(capacity)
        self._w = window_tokens

    @property
    def free(self) -> int:
        """How many more nodes there is room for."""
        return len(self._free)

    def append(self, row: int, nodes: I32, tokens: I32, windows: U64, prefixes: U64) -> I32:
        """Store the part of a sequence that its `nodes` so far do not hold; return all its nodes.

        Args:
            row: number of the sequence, kept with each node.
            nodes: the full windows stored so far, in order.
            tokens: int32 [n], the whole sequence.
            windows: keys of the full windows, [n // w].
            prefixes: keys of the prefixes that end where those windows end, [n // w].
        """
        old, full, total = len(nodes), len(windows), -(-len(tokens) // self._w)
        added = self._free.take(total - old)
        rest = tokens[old * self._w :]
        cells = np.full((len(added), self._w), NO_TOKEN, np.int32)
        cells.reshape(-1)[: len(rest)] = rest
        self.cells[added] = cells
        self.row[added] = row
        self.offset[added] = np.arange(old, total, dtype=np.int32) * self._w
        nodes = np.concatenate([nodes, added])
        self.before[nodes[1:]] = nodes[:-1]
        self.after[nodes[:-1]] = nodes[1:]
        self.before[nodes[:1]] = 0
        self.after[nodes[-1:]] = 0
        self.windows.insert(nodes[old:full], windows[old:])
        self.prefixes.insert(nodes[old:full], prefixes[old:])
        return nodes

    def remove(self, nodes: I32, full: int) -> None:
        """Forget nodes of one sequence, the first `full` of which are full windows."""
        if full:
            self.windows.remove(nodes[:full])
            self.prefixes.remove(nodes[:full])
        self._free.give(nodes)

    def equal(self, nodes: I32, texts: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which tokens of the nodes' windows equal `texts` [len(nodes), w]."""
        equal: NDArray[np.bool_] = self.cells.take(nodes, axis=0) == texts
        return equal

    @property
    def bytes_per_node(self) -> int:
        """Memory of one node in all arrays, buckets included."""
        own = 4 * self._w + 5 * 4  # row, offset, before, after, free list
        return own + self.windows.bytes_per_node + self.prefixes.bytes_per_node
