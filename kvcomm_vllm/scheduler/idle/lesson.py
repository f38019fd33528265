# SPDX-License-Identifier: Apache-2.0
"""A lesson: one served prompt from which deviations are to be learned while the engine is idle.

The true KV of its leading pages may still lie in vLLM's prefix cache (all of it, if the request was
served without reuse); what is missing is computed by side forward into scratch pages, a piece per
idle step: an *audit*. The base KV is read from the pages the request was, or would have been,
served from.

Then the spans are learned, one per idle step: learning takes longer than computing a piece does.

A lesson holds no page, not even while a piece is under way: its scratch pages are free, and stay as
they are as long as nothing is allocated, which is what interrupts it. Workers take steps in their
order, so whoever gets a page next writes it after the piece has read it; and vLLM's prefix cache,
which cannot be reset while a page is held, can be at any time. It starts again with what it has not
taught yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kvcomm_vllm.messages import HoleOp, LessonOp, LoadOp, StepReport
from kvcomm_vllm.scheduler.index import Match
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.spans import Source

HOLDER = "kvcomm lesson"


@dataclass(frozen=True, slots=True)
class TaughtSpan:
    """Text that arrived in a placeholder, and where its base KV lies.

    Args:
        placeholder_start: position of the placeholder's first token in the prompt.
        stop: true KV is needed up to here, for what stands behind it; 0 if for nothing.
    """

    key: str
    placeholder_start: int
    source: Source
    stop: int = 0

    @property
    def match(self) -> Match:
        s = self.source
        return Match(s.sequence, s.prompt_start, s.sequence_start, s.length)


Part = tuple[TaughtSpan, Source]


class Teacher(Protocol):
    """The mode a lesson is for: it knows what workers are to keep, and hears how it went."""

    def assign(self, lesson: Lesson, op: LessonOp) -> None:
        """Put into a piece what is to be learned from ``lesson.taught``."""

    def learned(self, lesson: Lesson, report: StepReport) -> None: ...

    def failed(self, lesson: Lesson) -> None:
        """Workers may differ now in what they know of the lesson's placeholders."""


@dataclass(slots=True)
class Lesson:
    """One served prompt, and how far learning from it has come.

    Args:
        tokens: the prompt up to the end of what is taught, int32.
        exact_hashes: hashes of its full pages on vLLM's exact chain.
        spans: what it has not taught yet.

    Attributes:
        parts: the spans' parts whose base KV is still there; known once it has started.
        taught: those of one span, which the last piece teaches.
        end: true KV is needed up to here, for all parts.
    """

    teacher: Teacher
    number: int
    tokens: np.ndarray
    exact_hashes: list[bytes]
    spans: list[TaughtSpan]
    pages: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    taught: list[Part] = field(default_factory=list)
    end: int = 0
    computed: int = 0

    def start(self, pages: SourcePages) -> bool:
        """Find its pages; False if there is nothing left to learn from, or no room."""
        parts = [(s, part) for s in self.spans for part in pages.sources(s.match, self.tokens)]
        if not parts:
            return False
        size = pages.block_size
        end = max(max(part.end, taught.stop) for taught, part in parts)
        self.pages = pages.leading_ids(self.exact_hashes[: -(-end // size)])
        known = len(self.pages)
        self.parts, self.taught = parts, []
        self.end, self.computed = end, min(known * size, end)
        scratch = -(-end // size) - known
        used = self.pages + [block for _, part in parts for block in part.blocks]
        # held until the scratch pages have been chosen, which are to be others
        if not pages.hold(HOLDER, used, needed=2 * scratch):
            return False
        self.pages += pages.hold_scratch(HOLDER, scratch)
        pages.release(HOLDER)
        return True

    def next_op(self, max_tokens: int) -> LessonOp:
        """The next piece: ``max_tokens`` to compute at most or, once all are, a span to learn."""
        start, end = self.computed, min(self.computed + max_tokens, self.end)
        if start < end:
            self.computed = end
            return LessonOp(self.number, self.pages, HoleOp(start, self.tokens[start:end].tolist()))
        span = self.parts[0][0]
        self.taught = [part for part in self.parts if part[0] is span]
        op = LessonOp(self.number, self.pages, None)
        self.teacher.assign(self, op)
        return op

    def done(self, report: StepReport) -> bool:
        """The last piece has succeeded; whether it was the lesson's last one."""
        if self.taught:
            self.teacher.learned(self, report)
            span = self.taught[0][0]
            self.spans = [other for other in self.spans if other is not span]
            self.parts = [part for part in self.parts if part[0] is not span]
            self.taught = []
        return not self.parts


def base_load(taught: TaughtSpan, part: Source, entry: int = -1) -> LoadOp:
    """Where the base KV of a part lies, and its place in the prompt."""
    return LoadOp(
        source_blocks=part.blocks,
        source_offset=part.block_offset,
        source_start=part.sequence_start,
        prompt_start=part.prompt_start,
        length=part.length,
        entry=entry,
        placeholder_index=part.prompt_start - taught.placeholder_start,
    )
