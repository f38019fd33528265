# SPDX-License-Identifier: Apache-2.0
"""What is known of placeholders: which have anchors, how well those predict, and who must go.

Anchors themselves lie in the workers' arenas, at the ``entry`` the scheduler assigns: no worker
decides anything, so tensor-parallel ranks cannot disagree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

FORGET = 0.8  # weight of what was known of a placeholder's errors when a new anchor comes


@dataclass(slots=True)
class Record:
    """What is known of one placeholder.

    Attributes:
        seen: requests in which it has occurred.
        entry: place in the workers' arenas; None while it has no anchors.
        anchors: deviations learned so far.
        left, means, whole: per K and V, decayed sums of squares of deviations, and of what was left
            of them with the predictions made before they were seen: by means and map, by means
            alone, by none.
    """

    key: str
    seen: int = 0
    entry: int | None = None
    anchors: int = 0
    left: tuple[float, float] = (0.0, 0.0)
    means: tuple[float, float] = (0.0, 0.0)
    whole: tuple[float, float] = (0.0, 0.0)

    @property
    def mapped(self) -> bool:
        """Whether the map has predicted better than the means alone."""
        return self._share(self.left) <= self._share(self.means)

    @property
    def error(self) -> float:
        """Share of the deviation that the better of both leaves; 1 = neither helps."""
        return min(self._share(self.left), self._share(self.means))

    def _share(self, rest: tuple[float, float]) -> float:
        """Of the deviation, mean of K and V."""
        if self.anchors < 2 or not all(self.whole):
            return 1.0
        return sum(x / y for x, y in zip(rest, self.whole, strict=True)) / 2


class PlaceholderTable:
    """Least recently used placeholders go first: their entry when another one needs it, all that is
    known of them when more than ``max_placeholders`` are.

    Args:
        capacity: entries of the workers' arenas.
    """

    def __init__(self, max_placeholders: int, min_anchors: int, max_error: float) -> None:
        self.max_placeholders = max_placeholders
        self.min_anchors = min_anchors
        self.max_error = max_error
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._with_entry: OrderedDict[str, Record] = OrderedDict()
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._records)

    def set_capacity(self, capacity: int) -> None:
        """Known once the workers have reserved their arenas; forgets everything."""
        self.capacity = capacity
        self.clear()

    def clear(self) -> None:
        self._records.clear()
        self._with_entry.clear()
        self._free = list(range(self.capacity - 1, -1, -1))

    def see(self, key: str) -> Record:
        """What is known of it, now the most recently used one."""
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = Record(key)
            if len(self._records) > self.max_placeholders:
                self.forget(next(iter(self._records)))
        self._records.move_to_end(key)
        if record.entry is not None:
            self._with_entry.move_to_end(key)
        return record

    def get(self, key: str) -> Record | None:
        return self._records.get(key)

    def warm(self, record: Record) -> bool:
        """Whether its anchors are enough, and have predicted well enough, to correct with."""
        return (
            record.entry is not None
            and record.anchors >= self.min_anchors
            and record.error < self.max_error
        )

    def give_entry(self, record: Record) -> bool:
        """Makes sure that it has an entry; True if it is a fresh one."""
        if record.entry is not None:
            return False
        if not self._free:
            self._drop_entry(next(iter(self._with_entry.values())))
        record.entry = self._free.pop()
        self._with_entry[record.key] = record
        return True

    def learned(self, record: Record, errors: SequenceOf[float]) -> None:
        """One more anchor; ``errors`` are ``ErrorSums`` as a list, summed over all ranks."""
        if record.entry is None:
            return
        k_left, k_all, v_left, v_all, k_means, v_means = errors
        if record.anchors:  # the first anchor had nothing to be predicted from
            record.left = _faded(record.left, k_left, v_left)
            record.means = _faded(record.means, k_means, v_means)
            record.whole = _faded(record.whole, k_all, v_all)
        record.anchors += 1

    def forget(self, key: str) -> None:
        record = self._records.pop(key, None)
        if record is not None and record.entry is not None:
            self._drop_entry(record)

    def _drop_entry(self, record: Record) -> None:
        assert record.entry is not None
        del self._with_entry[record.key]
        self._free.append(record.entry)
        record.entry, record.anchors = None, 0
        record.left = record.means = record.whole = (0.0, 0.0)

    def taught(self) -> list[str]:
        """Keys of the placeholders with anchors."""
        return list(self._with_entry)

    def counts(self) -> tuple[int, int]:
        """(placeholders with anchors, anchors in all)."""
        return len(self._with_entry), sum(record.anchors for record in self._with_entry.values())


def _faded(sums: tuple[float, float], k: float, v: float) -> tuple[float, float]:
    return FORGET * sums[0] + k, FORGET * sums[1] + v
