# SPDX-License-Identifier: Apache-2.0
"""Mode ``anchor``, scheduler side: which placeholders are corrected, which prompts teach."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Listing
from dataclasses import replace
from itertools import groupby
from operator import itemgetter

from kvcomm_vllm.messages import LessonOp, StepReport, WorkerFacts
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.idle.lesson import Lesson, TaughtSpan, base_load
from kvcomm_vllm.scheduler.modes.anchor_table import PlaceholderTable
from kvcomm_vllm.scheduler.modes.base import Parts
from kvcomm_vllm.scheduler.modes.placeholders import Placeholder
from kvcomm_vllm.scheduler.modes.plain import PlainMode
from kvcomm_vllm.scheduler.spans import Plan, Source
from kvcomm_vllm.scheduler.state import RequestState


class AnchorMode(PlainMode):
    """Corrects the spans of warm placeholders with what lessons have taught."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        config = self.config
        self.table = PlaceholderTable(
            config.max_placeholders, config.min_anchors, config.max_anchor_error
        )
        self.table.set_capacity(0)

    def set_capacity(self, facts: Listing[WorkerFacts]) -> None:
        """As many placeholders as every rank has room for."""
        self.table.set_capacity(min(fact.rooms["anchor"] for fact in facts))

    # ---- planning --------------------------------------------------------------------------------

    def corrected(
        self, state: RequestState, plan: Plan, placeholders: list[Placeholder]
    ) -> Plan | Reason:
        """The plan with warm placeholders' spans corrected; or none, so that the request is served
        exactly and placeholders learn from it.
        """
        if self._note(state, plan, placeholders) or state.hints.learn:
            return Reason.LEARNING
        return self._warmed(state, plan, placeholders)

    def known(self, key: str) -> bool:
        record = self.table.get(key)
        return record is not None and record.anchors > 0

    def _note(self, state: RequestState, plan: Plan, placeholders: list[Placeholder]) -> bool:
        """Keep a plan as a lesson where its placeholders have something to learn from it, and say
        whether the request must be served exactly for that (hint ``learn``, cold placeholders).
        """
        tokens, state.lesson = state.tokens(), None
        if not self.table.capacity:
            return False
        must = state.hints.learn
        taught = []
        for placeholder, sources in self._teaching(placeholders, plan):
            record = self.table.get(placeholder.key)
            seen, anchors = (record.seen, record.anchors) if record else (0, 0)
            must = must or seen < self.config.bootstrap_requests
            if anchors < self.config.max_anchors and (must or seen):
                taught.append(TaughtSpan(placeholder.key, placeholder.start, sources))
        if taught and (must or self.config.audits):
            end = max(span.end for span in taught)
            hashes = state.taint.exact_hashes(-(-end // self.pages.block_size))
            number = self.lessons.number()
            text = tokens[:end].copy()
            state.lesson = Lesson(self, number, text, hashes, taught, adapter=state.adapter)
        return must and state.lesson is not None

    def _teaching(
        self, placeholders: list[Placeholder], plan: Plan
    ) -> Iterator[tuple[Placeholder, tuple[Source, ...]]]:
        """Placeholders whose text has moved, each with all sources of that text."""
        spans = zip(placeholders, plan.spans, strict=True)
        for placeholder, group in groupby(spans, key=itemgetter(0)):
            sources = (span.source for _, span in group)
            moved = tuple(s for s in sources if not s.same_context and self._may_teach(s))
            if moved:
                yield placeholder, moved

    def _may_teach(self, source: Source) -> bool:
        return not source.approximate_tokens or self.config.learn_from_approximate

    def _warmed(self, state: RequestState, plan: Plan, placeholders: list[Placeholder]) -> Plan:
        """The plan with warm placeholders' spans corrected, behind their shorter seam."""
        limits = state.limits
        assert limits is not None
        spans = []
        for placeholder, span in zip(placeholders, plan.spans, strict=True):
            record = self.table.get(placeholder.key)
            if record is not None and self.table.warm(record) and not span.source.same_context:
                seam = min(span.seam, limits.anchor_seam_tokens)
                span = replace(
                    span,
                    start=span.start - span.seam + seam,
                    seam=seam,
                    entry=record.entry,
                    mapped=record.mapped,
                    placeholder_start=placeholder.start,
                )
            spans.append(span)
        return Plan(plan.local, tuple(spans))

    def admitted(self, state: RequestState, plan: Plan | None) -> None:
        """Its placeholders have occurred once more."""
        super().admitted(state, plan)
        if self.table.capacity:
            for key in state.planned_placeholders:
                self.table.see(key).seen += 1

    # ---- what comes of lessons -------------------------------------------------------------------

    def assign(self, lesson: Lesson, op: LessonOp) -> None:
        record = self.table.see(lesson.taught[0][0].key)
        self.table.give_entry(record)
        assert record.entry is not None
        op.fresh = [] if record.anchors else [record.entry]
        op.spans = [base_load(taught, part, record.entry) for taught, part in lesson.taught]

    def learned(self, lesson: Lesson, report: StepReport) -> None:
        record = self.table.get(lesson.taught[0][0].key)
        if record is not None:
            errors = [sum(of_parts) for of_parts in zip(*report.errors, strict=True)]
            self.table.learned(record, errors)
            approximate = any(part.approximate_tokens for _, part in lesson.taught)
            self.lessons.stats.count_taught(approximate=approximate)

    def failed(self, lesson: Lesson) -> None:
        for span in lesson.spans:
            self.table.forget(span.key)

    def counts(self) -> tuple[int, int]:
        return self.table.counts()

    def clear(self) -> None:
        """Weights or caches were reset: nothing learned holds any more."""
        super().clear()
        self.table.clear()
