# SPDX-License-Identifier: Apache-2.0
"""A hash table from 64-bit keys to chains of nodes, newest first, used in batches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvcomm_vllm.scheduler.index.linked_lists import Ids, LinkedLists
from kvcomm_vllm.scheduler.index.rolling_hash import I32, U64

FIBONACCI = np.uint64(0x9E3779B97F4A7C15)  # Knuth, The Art of Computer Programming, vol. 3, 6.4


class FreeList:
    """The unused ids of 1..capacity: returned ones, last first, then those never used, in order."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used = 0
        self._returned: I32 = np.zeros(capacity, np.int32)
        self._count = 0

    def __len__(self) -> int:
        return self._count + self._capacity - self._used

    def take(self, count: int) -> I32:
        """`count` ids; the caller has made sure that there are as many."""
        assert count <= len(self)
        again = min(count, self._count)
        fresh = np.arange(self._used + 1, self._used + 1 + count - again, dtype=np.int32)
        self._used += len(fresh)
        self._count -= again
        return np.concatenate([self._returned[self._count : self._count + again], fresh])

    def give(self, ids: I32) -> None:
        """Take ids back."""
        self._returned[self._count : self._count + len(ids)] = ids
        self._count += len(ids)


class HashChains:
    """Keys in separate chaining, and for each key the list of its nodes.

    Separate chaining, not open addressing: removal then leaves no tombstones, so there is never a
    rebuild that stalls the scheduler. A key shared by thousands of nodes costs a look-up of another
    key nothing.
    Memory: see `bytes_per_node`; reserved at once, committed by the system when touched.
    """

    def __init__(self, capacity: int) -> None:
        # Two to four buckets per key: the probe of an unknown key rarely has to read a known one.
        bits = capacity.bit_length() + 1
        self._shift = np.uint64(64 - bits)
        self._keys: U64 = np.zeros(capacity + 1, np.uint64)
        self._free_keys = FreeList(capacity)
        self._buckets = LinkedLists(nodes=capacity, lists=1 << bits)
        self._chains = LinkedLists(nodes=capacity, lists=capacity + 1)

    @property
    def older(self) -> I32:
        """[capacity + 1]: the next older node with the same key, 0 at the end."""
        return self._chains.next

    @property
    def bytes_per_node(self) -> int:
        """A node in its chain, its key (at worst one per node), and its share of the buckets."""
        lists, key, free = 12 + 4 + 12, 8, 4
        return lists + key + free + -(-self._buckets.head.nbytes // len(self._keys))

    def find(self, keys: U64) -> tuple[NDArray[np.intp], I32]:
        """Positions in `keys` that are known, ascending, and the newest node of each."""
        positions, entries = self._find_keys(keys)
        return positions, self._chains.head[entries]

    def insert(self, nodes: I32, keys: U64) -> None:
        """Chain each node to its key, before older ones; nodes of one call keep their order."""
        distinct, which = np.unique(keys, return_inverse=True)
        entries = np.zeros(len(distinct), np.int32)
        positions, known = self._find_keys(distinct)
        entries[positions] = known
        missing = np.flatnonzero(entries == 0)
        if len(missing):
            added = self._free_keys.take(len(missing))
            entries[missing] = added
            self._keys[added] = distinct[missing]
            self._buckets.push(added, self._bucket(distinct[missing]))
        self._chains.push(nodes, entries[which])

    def remove(self, nodes: Ids) -> None:
        """Forget nodes, and the keys that have none left."""
        entries = np.unique(self._chains.list_of[nodes])
        self._chains.remove(nodes)
        empty = entries[self._chains.head[entries] == 0]
        self._buckets.remove(empty)
        self._free_keys.give(empty)

    def _bucket(self, keys: U64) -> NDArray[np.int64]:
        return ((keys * FIBONACCI) >> self._shift).view(np.int64)

    def _find_keys(self, keys: U64) -> tuple[NDArray[np.intp], I32]:
        heads = self._buckets.head.take(self._bucket(keys))
        positions = np.flatnonzero(heads)
        entries = heads.take(positions)
        found_positions, found_entries = [positions[:0]], [entries[:0]]
        while len(positions):
            same = np.flatnonzero(self._keys.take(entries) == keys.take(positions))
            found_positions.append(positions.take(same))
            found_entries.append(entries.take(same))
            # Those found go on as well: cheaper than leaving them out, and no key is there twice.
            entries = self._buckets.next.take(entries)
            rest = np.flatnonzero(entries)
            positions, entries = positions.take(rest), entries.take(rest)
        positions, entries = np.concatenate(found_positions), np.concatenate(found_entries)
        order = np.argsort(positions)
        return positions.take(order), entries.take(order)
