# SPDX-License-Identifier: Apache-2.0
"""Mode ``paper``: the pools of all slots, and where in the workers' arenas their anchors lie."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from kvcomm_vllm.messages import AnchorRows
from kvcomm_vllm.scheduler.modes.paper.pool import PaperPool
from kvcomm_vllm.scheduler.modes.paper.row_ranges import RowRanges


@dataclass(slots=True)
class PaperSlot:
    """One slot.

    Attributes:
        rows: where each anchor lies, by the digest of its message.
        behind: token ids that followed each message, int32.
    """

    pool: PaperPool
    rows: dict[str, AnchorRows] = field(default_factory=dict)
    behind: dict[str, np.ndarray] = field(default_factory=dict)


class PaperSlots:
    """The least recently used slots go first, when there are too many or their rows are needed.

    Args:
        max_slots: slots remembered.
        max_anchor_num, window, quirks: see ``pool.PaperPool``.
    """

    def __init__(self, max_slots: int, max_anchor_num: int, window: int, quirks: bool) -> None:
        self.max_slots = max_slots
        self.max_anchor_num = max_anchor_num
        self.window = window
        self.quirks = quirks
        self._slots: OrderedDict[str, PaperSlot] = OrderedDict()
        self.set_capacity(0)

    def __len__(self) -> int:
        return len(self._slots)

    def set_capacity(self, rows: int) -> None:
        """Rows of the workers' arenas, known once they have started; forgets everything."""
        self.capacity = rows
        self.clear()

    def clear(self) -> None:
        self._slots.clear()
        self._free = RowRanges(self.capacity)

    def get(self, key: str) -> PaperSlot | None:
        return self._slots.get(key)

    def see(self, key: str) -> PaperSlot:
        """The slot, now the most recently used one."""
        slot = self._slots.get(key)
        if slot is None:
            pool = PaperPool(self.max_anchor_num, self.window, paper_quirks=self.quirks)
            slot = self._slots[key] = PaperSlot(pool)
            if len(self._slots) > self.max_slots:
                self.forget(next(iter(self._slots)))
        self._slots.move_to_end(key)
        return slot

    def store(self, key: str, message: str, tokens: int, behind: np.ndarray) -> AnchorRows | None:
        """Room for a new anchor; None if the pool does not want it, has it, or is without room.

        Args:
            message: digest of the text; ``tokens`` its length, ``behind`` what followed it.
        """
        slot = self.see(key)
        if not slot.pool.is_new(message) or (message in slot.pool and not self.quirks):
            return None
        count = tokens + len(behind)
        start = self._take(count, key)
        if start is None:
            return None
        outcome = slot.pool.store(message, tokens)
        if outcome.freed and outcome.evicted is not None:
            self._give_back(slot, outcome.evicted)
        self._give_back(slot, message)  # with quirks a message is stored again
        rows = AnchorRows(start, tokens, len(behind))
        slot.rows[message], slot.behind[message] = rows, behind
        return rows

    def _take(self, count: int, key: str) -> int | None:
        while (start := self._free.take(count)) is None:
            victim = next(iter(self._slots))
            if victim == key:  # the most recently used one: nobody else is left
                return None
            self.forget(victim)
        return start

    def _give_back(self, slot: PaperSlot, message: str) -> None:
        rows = slot.rows.pop(message, None)
        slot.behind.pop(message, None)
        if rows is not None:
            self._free.give(rows.start, rows.end - rows.start)

    def forget(self, key: str) -> None:
        slot = self._slots.pop(key, None)
        if slot is not None:
            for message in list(slot.rows):
                self._give_back(slot, message)

    def rows(self) -> dict[str, int]:
        """Rows of the arenas that each slot with anchors takes, by its key."""
        taken = {
            key: sum(rows.end - rows.start for rows in slot.rows.values())
            for key, slot in self._slots.items()
        }
        return {key: count for key, count in taken.items() if count}

    def counts(self) -> tuple[int, int]:
        """(slots, anchors in all)."""
        return len(self._slots), sum(len(slot.rows) for slot in self._slots.values())
