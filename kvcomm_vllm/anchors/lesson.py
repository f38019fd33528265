# SPDX-License-Identifier: Apache-2.0
"""A lesson: one served prompt from which deviations are to be learned while the engine is idle.

The true KV of its leading pages may still lie in vLLM's prefix cache (all of it, if the request was
served without reuse); what is missing is computed by side forward into scratch pages, a piece per
idle step: an *audit*. The base KV is read from the pages the request was, or would have been,
served from.

Between two steps a lesson holds no page: its scratch pages are free, and stay as they are as long
as nothing is allocated, which is what cancels it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kvcomm_vllm.messages import HoleOp, LessonOp, LoadOp
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.sequence import Match
from kvcomm_vllm.scheduler.spans import Source

HOLDER = "kvcomm lesson"


@dataclass(frozen=True, slots=True)
class TaughtSpan:
    """Text that arrived in a slot, and where its base KV lies; ``slot_start`` is the position of
    the slot's first token in the prompt.
    """

    key: str
    slot_start: int
    source: Source

    @property
    def match(self) -> Match:
        s = self.source
        return Match(s.sequence, s.prompt_start, s.sequence_start, s.length)


@dataclass(slots=True)
class Lesson:
    """Args:
    tokens: the prompt up to the end of its last span, int32.
    exact_hashes: hashes of its full pages on vLLM's exact chain.
    """

    number: int
    tokens: np.ndarray
    exact_hashes: list[bytes]
    spans: list[TaughtSpan]
    pages: list[int] = field(default_factory=list)
    parts: list[tuple[TaughtSpan, Source]] = field(default_factory=list)
    computed: int = 0
    sent: bool = False

    def start(self, pages: SourcePages) -> bool:
        """Find its pages; False if there is nothing left to learn from, or no room."""
        parts = [(s, part) for s in self.spans for part in pages.sources(s.match, self.tokens)]
        if not parts:
            return False
        size = pages.block_size
        end = max(part.end for _, part in parts)
        known = pages.leading(self.exact_hashes[: -(-end // size)])
        self.parts, self.computed = parts, min(known * size, end)
        self.tokens = self.tokens[:end]
        leading = [pages.lookup(block_hash) for block_hash in self.exact_hashes[:known]]
        self.sent = False
        self.pages = [block.block_id for block in leading if block is not None]
        scratch = -(-end // size) - known
        if not pages.hold(HOLDER, self._used(), needed=2 * scratch):
            return False
        self.pages += pages.hold_scratch(HOLDER, scratch)
        return True

    def resume(self, pages: SourcePages) -> None:
        """Take its pages again, which nobody has touched since the last step."""
        pages.hold(HOLDER, self._used(), needed=0)

    def _used(self) -> list[int]:
        return self.pages + [block for _, part in self.parts for block in part.blocks]

    def next_op(self, max_tokens: int, entries: dict[str, int], fresh: list[int]) -> LessonOp:
        """The next piece; with the last one the workers learn.

        Args:
            max_tokens: most tokens to compute in one step.
            entries: arena entry per slot key; ``fresh`` ones begin anew.
        """
        start, end = self.computed, min(self.computed + max_tokens, len(self.tokens))
        hole = HoleOp(start, self.tokens[start:end].tolist()) if start < end else None
        self.computed, self.sent = end, end == len(self.tokens)
        if not self.sent:
            return LessonOp(self.number, self.pages, hole, [], [])
        self.parts = [(taught, part) for taught, part in self.parts if taught.key in entries]
        spans = [self._load(taught, part, entries[taught.key]) for taught, part in self.parts]
        return LessonOp(self.number, self.pages, hole, spans, fresh)

    @staticmethod
    def _load(taught: TaughtSpan, part: Source, entry: int) -> LoadOp:
        return LoadOp(
            source_blocks=part.blocks,
            source_offset=part.block_offset,
            source_start=part.sequence_start,
            prompt_start=part.prompt_start,
            length=part.length,
            entry=entry,
            slot_index=part.prompt_start - taught.slot_start,
        )
