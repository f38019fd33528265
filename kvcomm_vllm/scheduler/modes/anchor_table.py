# SPDX-License-Identifier: Apache-2.0
"""The slots the scheduler knows: which have anchors, how well those predict, and who must go.

Anchors themselves lie in the workers' arenas, at the ``entry`` the scheduler assigns: no worker
decides anything, so tensor-parallel ranks cannot disagree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

FORGET = 0.8  # weight of what was known of a slot's errors when a new anchor comes


@dataclass(slots=True)
class Slot:
    """One slot.

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


class SlotTable:
    """Least recently used slots go first: their entry when another slot needs it, all that is known
    of them when more than ``max_slots`` are.

    Args:
        capacity: entries of the workers' arenas.
    """

    def __init__(self, max_slots: int, min_anchors: int, max_error: float) -> None:
        self.max_slots = max_slots
        self.min_anchors = min_anchors
        self.max_error = max_error
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._with_entry: OrderedDict[str, Slot] = OrderedDict()
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._slots)

    def set_capacity(self, capacity: int) -> None:
        """Known once the workers have reserved their arenas; forgets everything."""
        self.capacity = capacity
        self.clear()

    def clear(self) -> None:
        self._slots.clear()
        self._with_entry.clear()
        self._free = list(range(self.capacity - 1, -1, -1))

    def see(self, key: str) -> Slot:
        """The slot, now the most recently used one."""
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = Slot(key)
            if len(self._slots) > self.max_slots:
                self.forget(next(iter(self._slots)))
        self._slots.move_to_end(key)
        if slot.entry is not None:
            self._with_entry.move_to_end(key)
        return slot

    def get(self, key: str) -> Slot | None:
        return self._slots.get(key)

    def warm(self, slot: Slot) -> bool:
        """Whether its anchors are enough, and have predicted well enough, to correct with."""
        return (
            slot.entry is not None
            and slot.anchors >= self.min_anchors
            and slot.error < self.max_error
        )

    def give_entry(self, slot: Slot) -> bool:
        """Makes sure the slot has an entry; True if it is a fresh one."""
        if slot.entry is not None:
            return False
        if not self._free:
            self._drop_entry(next(iter(self._with_entry.values())))
        slot.entry = self._free.pop()
        self._with_entry[slot.key] = slot
        return True

    def learned(self, slot: Slot, errors: SequenceOf[float]) -> None:
        """One more anchor; ``errors`` are the sums of ``residual.ErrorSums`` over all ranks."""
        if slot.entry is None:
            return
        k_left, k_all, v_left, v_all, k_means, v_means = errors
        if slot.anchors:  # the first anchor had nothing to be predicted from
            slot.left = _faded(slot.left, k_left, v_left)
            slot.means = _faded(slot.means, k_means, v_means)
            slot.whole = _faded(slot.whole, k_all, v_all)
        slot.anchors += 1

    def forget(self, key: str) -> None:
        slot = self._slots.pop(key, None)
        if slot is not None and slot.entry is not None:
            self._drop_entry(slot)

    def _drop_entry(self, slot: Slot) -> None:
        assert slot.entry is not None
        del self._with_entry[slot.key]
        self._free.append(slot.entry)
        slot.entry, slot.anchors = None, 0
        slot.left = slot.means = slot.whole = (0.0, 0.0)

    def taught(self) -> list[str]:
        """Keys of the slots with anchors."""
        return list(self._with_entry)

    def counts(self) -> tuple[int, int]:
        """(slots with anchors, anchors in all)."""
        return len(self._with_entry), sum(slot.anchors for slot in self._with_entry.values())


def _faded(sums: tuple[float, float], k: float, v: float) -> tuple[float, float]:
    return FORGET * sums[0] + k, FORGET * sums[1] + v
