# SPDX-License-Identifier: Apache-2.0
"""Mode ``anchor``, scheduler side: which slots are corrected, and which prompts become lessons."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import replace

from kvcomm_vllm.messages import LessonOp, StepReport, WorkerFacts
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.idle.lesson import Lesson, TaughtSpan, base_load
from kvcomm_vllm.scheduler.modes.anchor_table import SlotTable
from kvcomm_vllm.scheduler.modes.base import Parts
from kvcomm_vllm.scheduler.modes.places import Place
from kvcomm_vllm.scheduler.modes.plain import PlainMode
from kvcomm_vllm.scheduler.spans import Plan, Source
from kvcomm_vllm.scheduler.state import RequestState


class AnchorMode(PlainMode):
    """Corrects the spans of warm slots with what lessons have taught."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        config = self.config
        self.table = SlotTable(config.max_slots, config.min_anchors, config.max_anchor_error)
        self.table.set_capacity(0)

    def set_capacity(self, facts: Listing[WorkerFacts]) -> None:
        """As many slots as every rank has room for."""
        self.table.set_capacity(min(fact.rooms["anchor"] for fact in facts))

    # ---- planning --------------------------------------------------------------------------------

    def corrected(self, state: RequestState, plan: Plan, stand: list[Place]) -> Plan | Reason:
        """The plan with warm slots' spans corrected; or none, so that the request is served exactly
        and slots learn from it.
        """
        if self._note(state, plan, stand) or state.hints.learn:
            return Reason.LEARNING
        return self._warmed(state, plan, stand)

    def known(self, key: str) -> bool:
        slot = self.table.get(key)
        return slot is not None and slot.anchors > 0

    def _note(self, state: RequestState, plan: Plan, found: list[Place]) -> bool:
        """Keep a plan as a lesson where its slots have something to learn from it, and say whether
        the request must be served exactly for that (hint ``learn``, cold slots).
        """
        tokens, state.lesson = state.tokens(), None
        if not self.table.capacity:
            return False
        must = state.hints.learn
        taught = []
        for place, span in zip(found, plan.spans, strict=True):
            if span.source.same_context or not self._may_teach(span.source):
                continue
            slot = self.table.get(place.key)
            seen, anchors = (slot.seen, slot.anchors) if slot else (0, 0)
            must = must or seen < self.config.bootstrap_requests
            if anchors < self.config.max_anchors and (must or seen):
                taught.append(TaughtSpan(place.key, place.start, span.source))
        if taught and (must or self.config.audits):
            end = max(span.source.end for span in taught)
            hashes = state.taint.exact_hashes(-(-end // self.pages.block_size))
            number = self.lessons.number()
            state.lesson = Lesson(self, number, tokens[:end].copy(), hashes, taught)
        return must and state.lesson is not None

    def _may_teach(self, source: Source) -> bool:
        return not source.approximate_tokens or self.config.learn_from_approximate

    def _warmed(self, state: RequestState, plan: Plan, found: list[Place]) -> Plan:
        """The plan with warm slots' spans corrected, behind their shorter seam."""
        limits = state.limits
        assert limits is not None
        spans = []
        for place, span in zip(found, plan.spans, strict=True):
            slot = self.table.get(place.key)
            if slot is not None and self.table.warm(slot) and not span.source.same_context:
                seam = min(span.seam, limits.anchor_seam_tokens)
                span = replace(
                    span,
                    start=span.start - span.seam + seam,
                    seam=seam,
                    entry=slot.entry,
                    mapped=slot.mapped,
                    slot_start=place.start,
                )
            spans.append(span)
        return Plan(plan.local, tuple(spans))

    def admitted(self, state: RequestState, plan: Plan | None) -> None:
        """Its slots have occurred once more."""
        if self.table.capacity:
            for key in state.planned_slots:
                self.table.see(key).seen += 1

    # ---- what comes of lessons -------------------------------------------------------------------

    def assign(self, lesson: Lesson, op: LessonOp) -> None:
        slot = self.table.see(lesson.taught[0][0].key)
        self.table.give_entry(slot)
        assert slot.entry is not None
        op.fresh = [] if slot.anchors else [slot.entry]
        op.spans = [base_load(taught, part, slot.entry) for taught, part in lesson.taught]

    def learned(self, lesson: Lesson, report: StepReport) -> None:
        slot = self.table.get(lesson.taught[0][0].key)
        for (_, part), errors in zip(lesson.taught, report.errors, strict=True):
            if slot is not None:
                self.table.learned(slot, errors)
                self.lessons.stats.count_taught(approximate=part.approximate_tokens > 0)

    def failed(self, lesson: Lesson) -> None:
        for span in lesson.spans:
            self.table.forget(span.key)

    def counts(self) -> tuple[int, int]:
        return self.table.counts()

    def clear(self) -> None:
        """Weights or caches were reset: nothing learned holds any more."""
        self.table.clear()
