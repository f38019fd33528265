# SPDX-License-Identifier: Apache-2.0
"""Mode ``paper``: the pools of all placeholders, and where their anchors lie in the workers."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from kvcomm_vllm.messages import AnchorRows
from kvcomm_vllm.scheduler.modes.paper.pool import PaperPool
from kvcomm_vllm.scheduler.modes.paper.row_ranges import RowRanges


@dataclass(slots=True)
class PaperRecord:
    """What is known of one placeholder.

    Attributes:
        rows: where each anchor lies, by the digest of its message.
        behind: token ids that followed each message, int32.
    """

    pool: PaperPool
    rows: dict[str, AnchorRows] = field(default_factory=dict)
    behind: dict[str, np.ndarray] = field(default_factory=dict)


class PaperTable:
    """The least recently used placeholders go first, when there are too many or their rows are
    needed.

    Args:
        max_placeholders: placeholders remembered.
        max_anchor_num, window, quirks: see ``pool.PaperPool``.
    """

    def __init__(
        self, max_placeholders: int, max_anchor_num: int, window: int, quirks: bool
    ) -> None:
        self.max_placeholders = max_placeholders
        self.max_anchor_num = max_anchor_num
        self.window = window
        self.quirks = quirks
        self._records: OrderedDict[str, PaperRecord] = OrderedDict()
        self.set_capacity(0)

    def __len__(self) -> int:
        return len(self._records)

    def set_capacity(self, rows: int) -> None:
        """Rows of the workers' arenas, known once they have started; forgets everything."""
        self.capacity = rows
        self.clear()

    def clear(self) -> None:
        self._records.clear()
        self._free = RowRanges(self.capacity)

    def get(self, key: str) -> PaperRecord | None:
        return self._records.get(key)

    def see(self, key: str) -> PaperRecord:
        """What is known of it, now the most recently used one."""
        record = self._records.get(key)
        if record is None:
            pool = PaperPool(self.max_anchor_num, self.window, paper_quirks=self.quirks)
            record = self._records[key] = PaperRecord(pool)
            if len(self._records) > self.max_placeholders:
                self.forget(next(iter(self._records)))
        self._records.move_to_end(key)
        return record

    def store(self, key: str, message: str, tokens: int, behind: np.ndarray) -> AnchorRows | None:
        """Room for a new anchor; None if the pool does not want it, has it, or is without room.

        Args:
            message: digest of the text; ``tokens`` its length, ``behind`` what followed it.
        """
        record = self.see(key)
        if not record.pool.is_new(message) or (message in record.pool and not self.quirks):
            return None
        count = tokens + len(behind)
        start = self._take(count, key)
        if start is None:
            return None
        outcome = record.pool.store(message, tokens)
        if outcome.freed and outcome.evicted is not None:
            self._give_back(record, outcome.evicted)
        self._give_back(record, message)  # with quirks a message is stored again
        rows = AnchorRows(start, tokens, len(behind))
        record.rows[message], record.behind[message] = rows, behind
        return rows

    def _take(self, count: int, key: str) -> int | None:
        while (start := self._free.take(count)) is None:
            victim = next(iter(self._records))
            if victim == key:  # the most recently used one: nobody else is left
                return None
            self.forget(victim)
        return start

    def _give_back(self, record: PaperRecord, message: str) -> None:
        rows = record.rows.pop(message, None)
        record.behind.pop(message, None)
        if rows is not None:
            self._free.give(rows.start, rows.end - rows.start)

    def forget(self, key: str) -> None:
        record = self._records.pop(key, None)
        if record is not None:
            for message in list(record.rows):
                self._give_back(record, message)

    def rows(self) -> dict[str, int]:
        """Rows of the arenas that each placeholder with anchors takes, by its key."""
        taken = {
            key: sum(rows.end - rows.start for rows in record.rows.values())
            for key, record in self._records.items()
        }
        return {key: count for key, count in taken.items() if count}

    def counts(self) -> tuple[int, int]:
        """(placeholders, anchors in all)."""
        return len(self._records), sum(len(record.rows) for record in self._records.values())
