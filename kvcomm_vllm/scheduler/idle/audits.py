# SPDX-License-Identifier: Apache-2.0
"""Audits: what of a request that has ended is worth computing again while the engine is idle."""

from __future__ import annotations

from collections.abc import Sequence as Listing

import numpy as np

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.messages import Divergence, WorkerFacts
from kvcomm_vllm.scheduler.fidelity import Announcer, Ledger
from kvcomm_vllm.scheduler.idle.comparison import Comparison
from kvcomm_vllm.scheduler.idle.healing import Healing
from kvcomm_vllm.scheduler.idle.lesson import Lesson
from kvcomm_vllm.scheduler.idle.lesson_queue import LessonQueue
from kvcomm_vllm.scheduler.index import Sequence, SequenceIndex
from kvcomm_vllm.scheduler.state import RequestState


class Audits:
    """Makes one lesson of all that is to be learned from a request and of its healing.

    Args:
        index: where healed sequences are found.
        lessons: where they wait.

    Attributes:
        ledger: hears of what comparisons find.
    """

    def __init__(self, config: KVCommConfig, index: SequenceIndex, lessons: LessonQueue) -> None:
        self.config = config
        self.index = index
        self.lessons = lessons
        self._told = told = Announcer(lessons.stats, config.fidelity_budget)
        self.ledger = Ledger(config.fidelity_budget, config.max_placeholders, told.changed)
        self._heals = self._compares = False

    def workers_ready(self, facts: Listing[WorkerFacts]) -> None:
        """An audit would wait for other engines that take part in this one's forwards."""
        alone = all(fact.alone for fact in facts)
        self._heals = alone and self.config.heal == "idle"
        self._compares = alone and self.config.audits and all(fact.compares for fact in facts)

    def ended(self, state: RequestState) -> None:
        """The request has ended, and what is kept of it is stored."""
        lesson, sequence = state.lesson, state.sequence
        if sequence is not None and sequence.first_approximate is not None:
            lesson = self._audit(state, sequence) or lesson
        if lesson is not None:
            self.lessons.add(lesson)

    def _audit(self, state: RequestState, sequence: Sequence) -> Lesson | None:
        """All of it as one lesson; None where nothing is to be healed or compared."""
        comparison = self._comparison(state, sequence) if self._compares else None
        if comparison is None and not self._heals:
            return None
        tokens = state.tokens()
        lesson = state.lesson or Lesson(None, self.lessons.number(), tokens[:0], [], [])
        lesson.taint, lesson.comparison = state.taint, comparison
        lesson.adapter = state.adapter
        ends = [len(lesson.tokens), comparison.position if comparison else 0]
        if self._heals:
            pages, stats = self.lessons.pages, self.lessons.stats
            lesson.healing = Healing(state.request, sequence, self.index, pages, stats)
            ends.append(lesson.healing.end)
        lesson.tokens = np.array(tokens[: max(ends)])
        return lesson

    def _comparison(self, state: RequestState, sequence: Sequence) -> Comparison | None:
        """None where the page with the prompt's last token was not kept."""
        position = sequence.num_prompt_tokens - 1
        hashes = sequence.block_hashes[: position // self.lessons.pages.block_size + 1]
        if position >= len(sequence.tokens):
            return None
        agent, uses = state.hints.agent, state.reused_uses

        def heard(divergence: Divergence) -> None:
            self.lessons.stats.count_audit(agent, divergence)
            self._told.of(agent)
            self.ledger.audited(uses, divergence.kl)

        return Comparison(position, int(state.tokens()[position]), hashes, heard)
