# SPDX-License-Identifier: Apache-2.0
"""A lesson: one served request from which deviations are to be learned while the engine is idle,
or that is to be healed, or of which is asked how far it was from exact, or all of these.

True KV may still lie in vLLM's prefix cache (all of it, if the request was served without reuse);
what is missing is computed by side forward into scratch pages, a piece per idle step: an *audit*.
The base KV is read from the pages the request was, or would have been, served from.

Spans are learned as soon as their true KV is there, one per idle step: learning takes longer than
computing a piece does. Then comes the comparison, and what has to be healed behind it.

A lesson holds no page, not even while a piece is under way: its scratch pages are free, and stay as
they are as long as nothing is allocated, which is what interrupts it. Workers take steps in their
order, so whoever gets a page next writes it after the piece has read it; and vLLM's prefix cache,
which cannot be reset while a page is held, can be at any time. It starts again with what it has not
taught or healed yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kvcomm_vllm.messages import Adapter, HoleOp, LessonOp, LoadOp, StepReport
from kvcomm_vllm.scheduler.idle.comparison import SPARE, Comparison
from kvcomm_vllm.scheduler.idle.healing import Healing
from kvcomm_vllm.scheduler.index import Match
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.spans import Source
from kvcomm_vllm.scheduler.taint import Taint

HOLDER = "kvcomm lesson"


@dataclass(frozen=True, slots=True)
class TaughtSpan:
    """Text that arrived in a placeholder, and where its base KV lies.

    Args:
        sources: more than one where parts of it lie in different requests' pages.
        placeholder_start: position of the placeholder's first token in the prompt.
        stop: true KV is needed up to here, for what stands behind it; 0 if for nothing.
    """

    key: str
    placeholder_start: int
    sources: tuple[Source, ...]
    stop: int = 0

    @property
    def end(self) -> int:
        """Where the text ends in the prompt."""
        return self.sources[-1].end

    def parts(self, pages: SourcePages, prompt: np.ndarray) -> list[Source]:
        """What of it is still there."""
        matches = (
            Match(s.sequence, s.prompt_start, s.sequence_start, s.length) for s in self.sources
        )
        return [part for match in matches for part in pages.sources(match, prompt)]


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
    """One served request, and how far learning from it and healing it have come.

    Args:
        teacher: None if nothing is learned from it.
        tokens: its first tokens, up to the end of what is taught or healed, int32.
        exact_hashes: hashes of its full pages on vLLM's exact chain.
        spans: what it has not taught yet.
        taint: computes all of the exact hashes as it starts, so that no request waits for that.
        healing: None if its true KV is not kept.
        comparison: None if it has been made, or is not to be.
        adapter: of the request.

    Attributes:
        pages: where its true KV is, or will be.
        parts: the spans' parts whose base KV is still there; known once it has started.
        taught: those of one span, which the last piece teaches.
        end: true KV is needed up to here; up to ``taught_end`` for the parts.
        served: the pages it was served from, of which the comparison asks, and ``spare`` ones.
        has_taught: something was learned from it.
    """

    teacher: Teacher | None
    number: int
    tokens: np.ndarray
    exact_hashes: list[bytes]
    spans: list[TaughtSpan]
    taint: Taint | None = None
    healing: Healing | None = None
    comparison: Comparison | None = None
    adapter: Adapter | None = None
    pages: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    taught: list[Part] = field(default_factory=list)
    served: list[int] = field(default_factory=list)
    spare: list[int] = field(default_factory=list)
    end: int = 0
    taught_end: int = 0
    computed: int = 0
    has_taught: bool = False
    _comparing: bool = False
    _size: int = 0
    _cached: frozenset[int] = frozenset()  # numbers of the pages that need not be computed

    @property
    def _heals(self) -> bool:
        return self.healing is not None and self.healing.wanted

    @property
    def finished(self) -> bool:
        return not self.parts and not self._heals and self.comparison is None

    def start(self, pages: SourcePages) -> bool:
        """Find its pages; False if nothing is left to be done, or no room.

        It may be finished at once, if all its true KV is there.
        """
        parts = [(span, part) for span in self.spans for part in span.parts(pages, self.tokens)]
        served = self.comparison.served(pages) if self.comparison is not None else None
        if served is None:
            self.comparison = None
        self.parts, self.taught, self.served = parts, [], served or []
        self._comparing, self._size = False, pages.block_size
        if self.finished:
            return False
        if self.taint is not None:
            self.exact_hashes = self.taint.restored(len(self.tokens) // self._size)
        self.taught_end = max((max(part.end, taught.stop) for taught, part in parts), default=0)
        ends = [self.taught_end]
        if self.healing is not None and self._heals:
            ends.append(self.healing.end)
        if self.comparison is not None:
            ends.append(self.comparison.position)
        self.end = max(ends)
        if not self._take_pages(pages):
            return False
        self.computed = self._behind_cached(0)
        if self.healing is not None:
            self.healing.advance(self.pages, self.computed)
        return True

    def _take_pages(self, pages: SourcePages) -> bool:
        count = -(-self.end // self._size)
        cached = pages.cached(self.exact_hashes[:count])
        self._cached = frozenset(cached)
        base = [block for _, part in self.parts for block in part.blocks]
        spare = SPARE if self.comparison is not None else 0
        needed = count - len(cached) + spare
        # held until the scratch pages have been chosen, which are to be others
        if not pages.hold(HOLDER, [*cached.values(), *base, *self.served], needed=2 * needed):
            return False
        scratch = iter(pages.hold_scratch(HOLDER, needed))
        self.spare = [next(scratch) for _ in range(spare)]
        self.pages = [cached[n] if n in cached else next(scratch) for n in range(count)]
        pages.release(HOLDER)
        return True

    def _behind_cached(self, position: int) -> int:
        """The first position from this one on whose true KV has to be computed."""
        while position < self.end and position // self._size in self._cached:
            position = (position // self._size + 1) * self._size
        return min(position, self.end)

    def next_op(self, max_tokens: int) -> LessonOp:
        """The next piece: ``max_tokens`` to compute at most or, once all are that it takes, a span
        to learn, or the comparison.
        """
        start, wanted = self.computed, self.end
        if self.parts:
            wanted = self.taught_end
        elif self.comparison is not None:
            wanted = self.comparison.position
        if start < wanted:
            end = min(start + max_tokens, self.end)
            pages = range(start // self._size + 1, -(-end // self._size))
            end = next((n * self._size for n in pages if n in self._cached), end)
            following = int(self.tokens[end]) if end < len(self.tokens) else -1
            hole = HoleOp(start, self.tokens[start:end].tolist(), following)
            self.computed = self._behind_cached(end)
            return LessonOp(self.number, self.pages, hole, adapter=self.adapter)
        op = LessonOp(self.number, self.pages, None, adapter=self.adapter)
        if not self.parts:
            assert self.comparison is not None, "something is left to be done"
            self._comparing = True
            op.comparison = self.comparison.op(self.pages, self.served, self.spare, self._size)
            return op
        span = self.parts[0][0]
        self.taught = [part for part in self.parts if part[0] is span]
        assert self.teacher is not None, "somebody has asked for these spans"
        self.teacher.assign(self, op)
        return op

    def done(self, report: StepReport, undisturbed: bool) -> None:
        """The last piece has succeeded.

        Args:
            undisturbed: no page has been given to anybody since it was sent.
        """
        if self.taught:
            assert self.teacher is not None
            self.teacher.learned(self, report)
            self.has_taught = True
            span = self.taught[0][0]
            self.spans = [other for other in self.spans if other is not span]
            self.parts = [part for part in self.parts if part[0] is not span]
            self.taught = []
        elif self._comparing:
            assert self.comparison is not None
            if report.divergence is not None:
                self.comparison.heard(report.divergence)
            self.comparison, self._comparing = None, False
        elif undisturbed and self.healing is not None:
            self.healing.advance(self.pages, self.computed)


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
