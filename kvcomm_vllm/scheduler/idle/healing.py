# SPDX-License-Identifier: Apache-2.0
"""Healing: the true KV of what was served approximately goes into vLLM's prefix cache.

A page is kept as soon as all its true KV is there, under the hash that plain vLLM would have given
it: whoever sends the same text finds it, as if the request had been served exactly. The stored
sequence follows page by page, so an interruption loses less than a page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.scheduler.index import Sequence, SequenceIndex
from kvcomm_vllm.scheduler.origin import computed_where_it_stands
from kvcomm_vllm.scheduler.pages import SourcePages

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Healing:
    """One request that has ended, and how far its KV is exact again.

    Args:
        request: is back on its exact chain of hashes before anything is healed.
        sequence: what the index holds of it, approximate from some token on.

    Attributes:
        end: tokens of the sequence.
        healed: its first tokens whose KV is exact, and found under exact hashes.
    """

    def __init__(
        self,
        request: Request,
        sequence: Sequence,
        index: SequenceIndex,
        pages: SourcePages,
        stats: KVCommStats,
    ) -> None:
        assert sequence.first_approximate is not None
        self.sequence = sequence
        self.end = len(sequence.tokens)
        size = pages.block_size
        self.healed = sequence.first_approximate // size * size
        self._request = request
        self._index = index
        self._pages = pages
        self._stats = stats
        self._hashes = sequence.block_hashes  # another list as soon as the sequence is another one
        self._private = self._hashes[self.healed // size :]

    @property
    def wanted(self) -> bool:
        """Whether anything is left to heal, and the index still holds the sequence as it was."""
        there = self.sequence in self._index and self.sequence.block_hashes is self._hashes
        return there and self.healed < self.end

    def advance(self, block_ids: list[int], computed: int) -> None:
        """The first ``computed`` tokens of these pages, which nobody uses, are true KV now."""
        if not self.wanted:
            return
        size = self._pages.block_size
        full, rest = divmod(min(computed, self.end), size)
        rest = rest if computed >= self.end else 0
        if full * size + rest <= self.healed:
            return
        kept = self._pages.keep_true(self._request, block_ids[: full + (rest > 0)], rest)
        healed = min(len(kept.hashes) * size, self.end)
        if healed <= self.healed:
            return
        new = (page for page in kept.fresh if page * size >= self.healed)
        fresh = sum(min(size, self.end - page * size) for page in new)
        self._stats.count_healed(fresh, healed - self.healed - fresh)
        self._rewrite(kept.hashes, healed)

    def _rewrite(self, hashes: list[bytes], healed: int) -> None:
        sequence, self.healed = self.sequence, healed
        self._index.heal(sequence, hashes, healed)
        computed_where_it_stands(sequence, healed)
        if healed == self.end:
            self._pages.first_to_go(self._private)
            self._pages.healed(sequence)
