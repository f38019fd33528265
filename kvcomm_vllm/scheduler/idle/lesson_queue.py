# SPDX-License-Identifier: Apache-2.0
"""Lessons wait here until vLLM has had nothing to do for a while, and are taken one by one.

No request ever waits for more than the piece that is running as it arrives, nor does an operator:
nothing is learned while the engine is paused, asleep or about to end.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.messages import LessonOp, StepReport
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.scheduler.engine_state import EngineState
from kvcomm_vllm.scheduler.idle.alarm import Alarm
from kvcomm_vllm.scheduler.idle.lesson import Lesson
from kvcomm_vllm.scheduler.pages import SourcePages

MAX_LESSONS = 64  # waiting; the oldest are dropped, their pages are the first to be gone
NAP_SECONDS = 2e-3  # between two looks of an engine that cannot be woken


class LessonQueue:
    """What is to be learned, until there is time for it.

    Args:
        pages: vLLM's pages.
        engine: says when nothing may be learned.
        wake: ends the engine's sleep; without it the engine goes round while lessons wait.
    """

    def __init__(
        self,
        config: KVCommConfig,
        pages: SourcePages,
        stats: KVCommStats,
        engine: EngineState,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        self.pages = pages
        self.stats = stats
        self.engine = engine
        self.alarm = Alarm(wake) if wake else None
        self._numbers = itertools.count()
        self._waiting: deque[Lesson] = deque()
        self._active: Lesson | None = None
        self._learned: StepReport | None = None  # of a span that is not settled yet
        self._in_flight = False
        self._interrupted = False
        self._idle_since: float | None = None
        self._sent_at = 0.0
        self._ready_at = 0.0

    def number(self) -> int:
        """A number for a new lesson."""
        return next(self._numbers)

    def add(self, lesson: Lesson) -> None:
        if len(self._waiting) == MAX_LESSONS:
            self._waiting.popleft()
            self.stats.count_lesson("dropped")
        self.stats.count_lesson("queued")
        self._waiting.append(lesson)

    @property
    def pending(self) -> bool:
        """Whether there is something to learn."""
        return bool(self._waiting) or self._active is not None

    def due(self) -> bool:
        """Whether vLLM's loop is to go on although no request is left; asked before it sleeps."""
        if self.engine.resting:
            self._interrupt()
            return False
        if not self.pending:
            return False
        asleep = self.alarm is not None and self._idle_since is not None and not self._in_flight
        return not asleep or time.monotonic() >= self._next_at

    @property
    def _next_at(self) -> float:
        """When the next piece may be learned, if no request comes."""
        assert self._idle_since is not None
        return max(self._idle_since + self.config.audit_idle_seconds, self._ready_at)

    def next_op(self, idle: bool) -> LessonOp | None:
        """Called every step; ``idle`` if no request is alive."""
        if not idle or self.engine.resting:
            self._interrupt()
            return None
        if not self.pending:
            return None
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        if now < self._next_at:
            self._rest(self._next_at - now)
            return None
        if self._in_flight:
            return None
        if self._active is None:
            self._start()
        if self._active is None:
            return None
        self._in_flight, self._sent_at = True, now
        if self._learned is not None:
            return LessonOp(self._active.number, [], None, settles=True)
        self._interrupted = False
        return self._active.next_op(self.config.audit_tokens)

    def _rest(self, seconds: float) -> None:
        if self.alarm is None:
            time.sleep(min(seconds, NAP_SECONDS))
        else:
            self.alarm.set(seconds)

    def _start(self) -> None:
        while self._waiting:
            lesson = self._waiting.pop()  # the newest: its pages are the likeliest to be left
            if not lesson.start(self.pages):
                self.stats.count_lesson("dropped")
            elif lesson.finished:
                self._count_finished(lesson)
            else:
                self._active = lesson
                return

    def _count_finished(self, lesson: Lesson) -> None:
        done = "audited" if lesson.healing is None else "healed"
        self.stats.count_lesson("learned" if lesson.has_taught else done)

    def _interrupt(self) -> None:
        """A request has come, or an operator wants the engine to rest: when that is over, the quiet
        time begins anew, and the lesson from its beginning.

        A piece that is under way (asynchronous scheduling) is waited for: it may be the last one.
        So is a span that workers have taken in: it is settled first, as soon as all is quiet again.
        """
        self._idle_since = None
        if self.alarm:
            self.alarm.stop()
        self._interrupted = True
        if not self._in_flight and self._learned is None:
            self._put_back()

    def _put_back(self) -> None:
        if self._active is not None:
            self._waiting.append(self._active)
            self._active = None

    def on_report(self, report: StepReport) -> None:
        if report.lesson < 0:
            return
        now = time.monotonic()
        self._ready_at = now + (now - self._sent_at) * (1 / self.config.audit_share - 1)
        self._in_flight = False
        if self.alarm and self._idle_since is not None and now < self._next_at:
            self.alarm.set(self._next_at - now)
        lesson = self._active
        if lesson is None or lesson.number != report.lesson:
            return
        learned, self._learned = self._learned, None
        if report.lesson_gone:
            self._active = None
            self.stats.count_lesson("dropped")
            return
        if report.lesson_failed:
            self._active = None
            self.stats.count_lesson("failed")
            if lesson.teacher is not None:
                lesson.teacher.failed(lesson)
            return
        if report.unsettled:
            self._learned = learned or report
            return
        lesson.done(learned or report, undisturbed=not self._interrupted)
        if lesson.finished:
            self._active = None
            self._count_finished(lesson)
        elif self._interrupted:
            self._put_back()

    def forget_adapter(self, number: int) -> None:
        """What waits to be learned with this adapter cannot be any more. Of what is under way
        workers say so.
        """
        kept = [one for one in self._waiting if one.adapter is None or one.adapter.number != number]
        for _ in range(len(self._waiting) - len(kept)):
            self.stats.count_lesson("dropped")
        self._waiting = deque(kept)

    def clear(self) -> None:
        """Weights or caches were reset: what waits is about KV that is gone."""
        for _ in range(len(self._waiting) + (self._active is not None)):
            self.stats.count_lesson("dropped")
        self._active = self._learned = None
        self._waiting.clear()
