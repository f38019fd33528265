# SPDX-License-Identifier: Apache-2.0
"""Learning, scheduler side: which slots are corrected, and which prompts become lessons when.

Lessons run in steps in which vLLM has nothing to do, and only after it has had nothing to do for a
while: no request ever waits for more than the piece that is running as it arrives.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import replace

from kvcomm_vllm.anchors.lesson import HOLDER, Lesson, TaughtSpan
from kvcomm_vllm.anchors.slot_table import SlotTable
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.messages import LessonOp, StepReport
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.slots import slot_keys
from kvcomm_vllm.scheduler.spans import Plan, Source
from kvcomm_vllm.scheduler.state import RequestState

MAX_LESSONS = 64  # waiting; the oldest are dropped, their pages are the first to be gone
NAP_SECONDS = 1e-3  # vLLM's idle loop spins while lessons wait for the engine to be idle for long


class Learning:
    """Args:
    pages: vLLM's pages.
    """

    def __init__(self, config: KVCommConfig, pages: SourcePages, stats: KVCommStats) -> None:
        self.config = config
        self.pages = pages
        self.stats = stats
        self.table = SlotTable(config.max_slots, config.min_anchors, config.max_anchor_error)
        self.table.set_capacity(0)
        self._numbers = itertools.count()
        self._waiting: deque[Lesson] = deque()
        self._active: Lesson | None = None
        self._in_flight = False
        self._idle_since: float | None = None

    # ---- planning --------------------------------------------------------------------------------

    def note(self, state: RequestState, plan: Plan) -> bool:
        """Name a plan's slots, keep it as a lesson where they have something to learn from it, and
        say whether the request must be served exactly for that (hint ``learn``, cold slots).
        """
        tokens = state.tokens()
        state.planned_slots, state.lesson = slot_keys(plan, tokens, state.namespace), None
        if not self.table.capacity or state.mode != "anchor":
            return False
        must = state.hints.learn
        taught = []
        for key, span in zip(state.planned_slots, plan.spans, strict=True):
            if span.source.same_context or not self._may_teach(span.source):
                continue
            slot = self.table.get(key)
            seen, anchors = (slot.seen, slot.anchors) if slot else (0, 0)
            must = must or seen < self.config.bootstrap_requests
            if anchors < self.config.max_anchors and (must or seen):
                taught.append(TaughtSpan(key, span.start - span.seam, span.source))
        if taught and (must or self.config.audits):
            end = max(span.source.end for span in taught)
            hashes = state.taint.exact_hashes(-(-end // self.pages.block_size))
            state.lesson = Lesson(next(self._numbers), tokens[:end].copy(), hashes, taught)
        return must and state.lesson is not None

    def _may_teach(self, source: Source) -> bool:
        first = source.sequence.first_approximate
        exact = first is None or first >= source.sequence_start + source.length
        return exact or self.config.learn_from_approximate

    def corrected(self, state: RequestState, plan: Plan) -> Plan:
        """The plan with warm slots' spans corrected, behind their shorter seam."""
        limits = state.limits
        assert limits is not None
        if state.mode != "anchor":
            return plan
        spans = []
        for key, span in zip(state.planned_slots, plan.spans, strict=True):
            slot = self.table.get(key)
            if slot is not None and self.table.warm(slot) and not span.source.same_context:
                seam = min(span.seam, limits.anchor_seam_tokens)
                start = span.start - span.seam + seam
                span = replace(span, start=start, seam=seam, entry=slot.entry)
            spans.append(span)
        return Plan(plan.local, tuple(spans))

    def admitted(self, state: RequestState) -> None:
        """Its slots have occurred once more."""
        if self.table.capacity and state.mode == "anchor":
            for key in state.planned_slots:
                self.table.see(key).seen += 1

    def finish(self, state: RequestState) -> None:
        """The request has ended: what it can teach waits for an idle moment."""
        lesson, state.lesson = state.lesson, None
        if lesson is None:
            return
        if len(self._waiting) == MAX_LESSONS:
            self._waiting.popleft()
            self.stats.count_lesson("dropped")
        self._waiting.append(lesson)

    # ---- idle steps ------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether vLLM's loop is to go on although no request is left."""
        return bool(self._waiting) or self._active is not None

    def next_op(self, idle: bool) -> LessonOp | None:
        """Called every step; ``idle`` if no request is alive."""
        if not idle:
            self._idle_since = None
            self._cancel()
            return None
        if not self.pending:
            return None
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        if now - self._idle_since < self.config.audit_idle_seconds:
            time.sleep(NAP_SECONDS)
            return None
        if self._in_flight:
            return None
        if self._active is not None:
            self._active.resume(self.pages)
        else:
            self._start()
        return self._op(self._active) if self._active is not None else None

    def _start(self) -> None:
        while self._waiting:
            lesson = self._waiting.pop()  # the newest: its pages are the likeliest to be left
            if lesson.start(self.pages):
                self._active = lesson
                return
            self.stats.count_lesson("dropped")

    def _op(self, lesson: Lesson) -> LessonOp:
        slots = {span.key: self.table.see(span.key) for span in lesson.spans}
        for slot in slots.values():
            self.table.give_entry(slot)
        # one of many slots may have lost its entry to a later one
        entries = {key: slot.entry for key, slot in slots.items() if slot.entry is not None}
        fresh = [entry for key, entry in entries.items() if not slots[key].anchors]
        self._in_flight = True
        return lesson.next_op(self.config.audit_tokens, entries, fresh)

    def _cancel(self) -> None:
        """A request has come: the lesson starts from its beginning when there is time again.

        A piece that is under way (asynchronous scheduling) is waited for: it may be the last one.
        """
        if self._active is not None and not self._in_flight:
            self._waiting.append(self._active)
            self._active = None

    def on_report(self, report: StepReport) -> None:
        if report.lesson < 0:
            return
        self.pages.release(HOLDER)
        self._in_flight = False
        lesson = self._active
        if lesson is None or lesson.number != report.lesson:
            return
        if not lesson.sent and not report.lesson_failed:
            if self._idle_since is None:
                self._cancel()
            return
        self._active = None
        self.stats.count_lesson("failed" if report.lesson_failed else "learned")
        if report.lesson_failed:  # ranks may differ now in what they know
            for span in lesson.spans:
                self.table.forget(span.key)
            return
        for (taught, _), errors in zip(lesson.parts, report.errors, strict=True):
            slot = self.table.get(taught.key)
            if slot is not None:
                self.table.learned(slot, errors)

    def clear(self) -> None:
        """Weights or caches were reset: nothing learned holds any more."""
        self._active = None
        self._waiting.clear()
        self.table.clear()
