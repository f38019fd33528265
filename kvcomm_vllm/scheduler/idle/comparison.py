# SPDX-License-Identifier: Apache-2.0
"""Comparison: would a request's first token have been the same, had it been served exactly?

Once an audit has the true KV of a prompt, workers compute what follows its last token twice: over
true KV, and over the pages the request was served from, as long as they are cached. Nothing is
sampled, and no page is written that anybody can find: what the last page holds before that token
is copied into pages of nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvcomm_vllm.messages import CompareOp, Divergence, LoadOp
from kvcomm_vllm.scheduler.pages import SourcePages

SPARE = 2  # pages that it writes


@dataclass(frozen=True)
class Comparison:
    """One request that has ended.

    Args:
        position: of its prompt's last token; true KV is needed up to there.
        token: that token.
        hashes: of the pages it was served from, up to the one with that token.
        heard: what is done with the answer.
    """

    position: int
    token: int
    hashes: list[bytes]
    heard: Callable[[Divergence], None]

    def served(self, pages: SourcePages) -> list[int] | None:
        """The pages it was served from; None if one of them is gone."""
        found = pages.cached(self.hashes)
        return list(found.values()) if len(found) == len(self.hashes) else None

    def op(self, true: list[int], served: list[int], spare: list[int], size: int) -> CompareOp:
        """The question to the workers.

        Args:
            true, served: pages of both, of ``size`` tokens.
            spare: ``SPARE`` pages of nobody.
        """
        last, filled = divmod(self.position, size)
        start, both = last * size, (true, served)
        tables = [[*pages[:last], page] for pages, page in zip(both, spare, strict=True)]
        copies = []
        if filled:
            copies = [LoadOp([pages[last]], 0, start, start, filled) for pages in both]
        return CompareOp(self.position, self.token, tables, copies)
