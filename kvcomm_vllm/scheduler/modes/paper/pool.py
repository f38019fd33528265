# SPDX-License-Identifier: Apache-2.0
"""The paper's pool of one placeholder, as the scheduler knows it: which messages are anchors, how
often each was used, and which one must go (section 3.4). The tensors lie in the workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

MAX_FLAGS = 4096  # messages whose prediction is remembered; the oldest are new again


@dataclass(frozen=True)
class Stored:
    """What a store did.

    Attributes:
        stored: whether its deviations belong into the pool; False = drop them.
        evicted: the message that lost its count for it.
        freed: whether the evicted message held an anchor, whose memory is free now. With quirks
            that may be the stored message itself: what was known of it is lost.
    """

    stored: bool
    evicted: str | None = None
    freed: bool = False


class PaperPool:
    """Anchors of one placeholder in the order they were added, by content hash of their message.

    A full pool lets go of the least used among its oldest anchors. Counts never age.

    Args:
        max_anchor_num: V, anchors a pool may hold.
        window: how many of the oldest are considered.
        paper_quirks: as the paper's code: messages are counted from their prediction on, so one
            without an anchor may be evicted in vain; a store evicts first and inserts then, only
            when there are more than V, and for a message it has as well, even that message itself.
            Such a pool settles at V or V + 1 and may grow beyond. Otherwise it never holds more
            than V, and only a new message evicts another.

    Raises:
        ValueError: if V or the window is below 1.
    """

    def __init__(
        self, max_anchor_num: int = 20, window: int = 5, *, paper_quirks: bool = False
    ) -> None:
        if max_anchor_num < 1 or window < 1:
            raise ValueError(f"max_anchor_num {max_anchor_num} and window {window} must be above 0")
        self.max_anchor_num = max_anchor_num
        self.window = window
        self.paper_quirks = paper_quirks
        self._anchors: dict[str, int] = {}  # tokens of each
        self._counts: dict[str, int] = {}
        self._new: dict[str, bool] = {}

    def __len__(self) -> int:
        return len(self._anchors)

    def __contains__(self, message: str) -> bool:
        return message in self._anchors

    @property
    def messages(self) -> list[str]:
        """Messages that are anchors; their places are the pool indices of the gate."""
        return list(self._anchors)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each anchor, in pool order."""
        return list(self._anchors.values())

    def is_new(self, message: str) -> bool:
        """Whether the gate last called the message a new anchor; True where it was not asked."""
        return self._new.get(message, True)

    def predict(self, message: str, new_anchor: bool) -> None:
        """Remember what the gate said: only a new anchor will be stored."""
        self._new.pop(message, None)
        self._new[message] = new_anchor
        if len(self._new) > MAX_FLAGS:
            del self._new[next(iter(self._new))]
        if self.paper_quirks and new_anchor:
            self._counts[message] = 0

    def activate(self, indices: Iterable[int]) -> None:
        """Add one activation per index of ``gate.GateDecision``.

        With quirks an index is a place among the counts, which need not be the anchor's own.
        """
        keys = list(self._counts)
        for index in indices:
            if index < len(keys):
                self._counts[keys[index]] += 1

    def store(self, message: str, tokens: int) -> Stored:
        """Deviations of a message are known: insert it, of the length of its first store."""
        if not self.is_new(message):
            return Stored(stored=False)
        evicted, freed = None, False
        if self._must_evict(message):
            evicted = min(islice(self._counts, self.window), key=self._counts.__getitem__)
            del self._counts[evicted]
            freed = self._anchors.pop(evicted, None) is not None
        if message not in self._anchors:
            self._anchors[message] = tokens
            self._counts[message] = 0
        return Stored(True, evicted, freed)

    def _must_evict(self, message: str) -> bool:
        if self.paper_quirks:
            return len(self._anchors) > self.max_anchor_num
        return message not in self._anchors and len(self._anchors) >= self.max_anchor_num
