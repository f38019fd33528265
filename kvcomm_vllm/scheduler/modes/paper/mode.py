# SPDX-License-Identifier: Apache-2.0
"""Mode ``paper``, scheduler side: all of a prompt's messages are shared and corrected, or none.

As in the paper: messages (REUSE spans) get the weighted deviations of their placeholder's anchors,
and so does the text behind them; only the last token is computed, and what no anchor knows (text
before the first message, a message's last tokens whose page was lost). A message that the gate does
not let pass, or that too few anchors cover, makes the request dense, and itself an anchor.

The gate asks how far a message's KV is from its placeholder's anchors. Workers answer that (a
*probe*), so a request waits one step for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field, replace

import numpy as np
import xxhash

from kvcomm_vllm.messages import (
    AnchorOp,
    AnchorRows,
    LessonOp,
    ProbeOp,
    StepReport,
    WorkerFacts,
)
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.idle.lesson import Lesson, TaughtSpan, base_load
from kvcomm_vllm.scheduler.modes.base import AskAgain, Found, Parts
from kvcomm_vllm.scheduler.modes.paper import gate
from kvcomm_vllm.scheduler.modes.paper.table import PaperRecord, PaperTable
from kvcomm_vllm.scheduler.modes.placeholders import placeholder_keys
from kvcomm_vllm.scheduler.operations import source_load
from kvcomm_vllm.scheduler.planner import stretches
from kvcomm_vllm.scheduler.spans import Estimate, Plan, ReuseSpan
from kvcomm_vllm.scheduler.state import RequestState

MAX_PROBES = 4  # of one request: its sources may change while it waits


@dataclass(frozen=True)
class Message:
    """The text in a placeholder of a prompt; ``behind_end`` is where the next one starts, or the
    prompt ends.
    """

    key: str
    digest: str
    span: ReuseSpan
    behind_end: int

    @property
    def identity(self) -> tuple[str, str, int, int]:
        """Two with the same identity have the same distances to the same anchors."""
        source = self.span.source
        return self.key, self.digest, id(source.sequence), source.sequence_start


@dataclass
class Probe:
    """What was asked for a request, and the answer: per message the anchors of its placeholder that
    cover it (by pool index), and the squared distances to them.
    """

    identity: list[tuple[str, str, int, int]]
    covering: list[list[int]]
    asked: int = 1
    answered: bool = False
    distances: list[list[float]] | None = None


@dataclass(frozen=True)
class Verdict:
    """What the gate said of one message."""

    key: str
    message: str
    decision: gate.GateDecision


@dataclass
class Gated:
    """What a request keeps for this mode (``mode_data``)."""

    probe: Probe | None = None
    verdicts: list[Verdict] = field(default_factory=list)


def gated(state: RequestState) -> Gated:
    if not isinstance(state.mode_data, Gated):
        state.mode_data = Gated()
    return state.mode_data


class PaperMode:
    """Shares all of a prompt's messages or none, as the paper's gate says."""

    def __init__(self, parts: Parts) -> None:
        self.config = config = parts.config
        self.lessons = parts.lessons
        self.pages = parts.pages
        self.table = PaperTable(
            config.max_placeholders, config.paper.anchors, config.paper.window, config.paper.quirks
        )
        self._probes: list[ProbeOp] = []

    def set_capacity(self, facts: Listing[WorkerFacts]) -> None:
        """As many rows as every rank has room for."""
        self.table.set_capacity(min(fact.rooms["paper"] for fact in facts))

    # ---- planning --------------------------------------------------------------------------------

    def plan(self, state: RequestState, found: Found) -> Plan | Reason | AskAgain:
        """All or nothing, once a probe has been answered."""
        limits = found.limits
        if not self.table.capacity:
            return Reason.NO_PAPER_MEMORY
        whole = stretches(found.spans, limits.min_span_tokens)
        spans = [span for stretch in whole for span in stretch.spans]
        if not spans:
            return Reason.TOO_SHORT
        plan = Plan(found.local, tuple(spans))
        messages = self._messages(state, plan)
        records = [self.table.see(m.key) for m in messages]
        covering = [
            gate.covering_anchors(record.pool.lengths, m.span.length)
            for m, record in zip(messages, records, strict=True)
        ]
        distances: list[list[float]] | None = None
        if not state.hints.learn and all(len(c) >= gate.MIN_ANCHORS for c in covering):
            probe = self._probe(state, messages, records, covering)
            if not probe.answered:
                return AskAgain.PROBE
            distances = probe.distances
        verdicts = self._verdicts(messages, records, covering, distances)
        gated(state).verdicts = verdicts
        if any(verdict.decision.new_anchor for verdict in verdicts):
            state.lesson = self._lesson(state, messages)
            return Reason.LEARNING
        estimates = iter(
            self._estimate(state.tokens(), m, record, covers)
            for m, record, covers in zip(messages, records, covering, strict=True)
        )
        plan = Plan(
            found.local,
            tuple(
                span if span.source.same_context else replace(span, estimate=next(estimates))
                for span in spans
            ),
        )
        return plan if plan.reused_tokens >= limits.min_reuse_tokens else Reason.TOO_LITTLE

    def _messages(self, state: RequestState, plan: Plan) -> list[Message]:
        tokens = state.tokens()
        state.planned_placeholders = placeholder_keys(plan, tokens, state.namespace)
        state.lesson = None
        ends = [*(span.start for span in plan.spans[1:]), len(tokens)]
        return [
            Message(key, _digest(tokens[span.start : span.end]), span, end)
            for key, span, end in zip(state.planned_placeholders, plan.spans, ends, strict=True)
            if not span.source.same_context
        ]

    def _probe(
        self,
        state: RequestState,
        messages: list[Message],
        records: list[PaperRecord],
        covering: list[list[int]],
    ) -> Probe:
        """The answer to this very question, or a probe that is on its way."""
        identity = [m.identity for m in messages]
        mine = gated(state)
        known = mine.probe
        if known is not None and not known.answered:
            return known
        if known is not None and (known.identity, known.covering) == (identity, covering):
            return known
        asked = known.asked + 1 if known else 1
        mine.probe = probe = Probe(identity, covering, asked, answered=asked > MAX_PROBES)
        if not probe.answered:
            spans = [
                (source_load(m.span, self.pages.block_size), [_rows(record)[i] for i in covers])
                for m, record, covers in zip(messages, records, covering, strict=True)
            ]
            blocks = [block for m in messages for block in m.span.source.blocks]
            self.pages.hold(_holder(state.id), blocks, needed=0)
            self._probes.append(ProbeOp(state.id, spans))
        return probe

    def take_probes(self) -> list[ProbeOp]:
        """What is to be asked in this step."""
        probes, self._probes = self._probes, []
        return probes

    def on_distances(
        self, request_id: str, state: RequestState | None, found: list[list[float]] | None
    ) -> None:
        """A probe's answer; ``state`` is None if the request is gone."""
        self.pages.release(_holder(request_id))
        mine = None if state is None else state.mode_data
        if isinstance(mine, Gated) and mine.probe is not None:
            mine.probe.answered, mine.probe.distances = True, found

    def _verdicts(
        self,
        messages: list[Message],
        records: list[PaperRecord],
        covering: list[list[int]],
        distances: list[list[float]] | None,
    ) -> list[Verdict]:
        """Without distances every message that the gate was not asked about is a new anchor."""
        found = []
        for number, (m, record) in enumerate(zip(messages, records, strict=True)):
            decision = gate.GateDecision(new_anchor=True)
            if distances is not None:
                lengths = record.pool.lengths
                near = [math.inf] * len(lengths)
                for index, square in zip(covering[number], distances[number], strict=True):
                    near[index] = math.sqrt(square)
                decision = gate.decide(
                    near,
                    lengths,
                    m.span.length,
                    gamma=self.config.paper.gamma,
                    top_p=self.config.paper.top_p,
                    paper_quirks=self.config.paper.quirks,
                )
            found.append(Verdict(m.key, m.digest, decision))
        return found

    @staticmethod
    def _estimate(
        tokens: np.ndarray, m: Message, record: PaperRecord, covers: list[int]
    ) -> Estimate:
        messages = [record.pool.messages[i] for i in covers]
        behind = tokens[m.span.end : m.behind_end]
        known = [_common_suffix(behind, record.behind[message]) for message in messages]
        # what one anchor alone has in common may be chance
        shared = sorted(known)[-gate.MIN_ANCHORS]
        stop = min(m.behind_end, len(tokens) - 1)
        return Estimate(
            anchors=tuple(record.rows[message] for message in messages),
            start=min(m.behind_end - shared, stop),
            stop=stop,
            behind_end=m.behind_end,
            known=tuple(known),
        )

    def _lesson(self, state: RequestState, messages: list[Message]) -> Lesson:
        tokens = state.tokens()
        taught = [TaughtSpan(m.key, m.span.start, (m.span.source,), m.behind_end) for m in messages]
        hashes = state.taint.exact_hashes(-(-len(tokens) // self.pages.block_size))
        number = self.lessons.number()
        return Lesson(self, number, tokens.copy(), hashes, taught, adapter=state.adapter)

    def admitted(self, state: RequestState, plan: Plan | None) -> None:
        """The request is served as planned: what the gate said counts now."""
        mine = gated(state)
        verdicts, mine.verdicts = mine.verdicts, []
        for verdict in verdicts:
            pool = self.table.see(verdict.key).pool
            pool.predict(verdict.message, verdict.decision.new_anchor)
            if plan is not None:
                pool.activate(verdict.decision.activated)

    # ---- what comes of lessons -------------------------------------------------------------------

    def assign(self, lesson: Lesson, op: LessonOp) -> None:
        for taught, part in lesson.taught:
            if (part.prompt_start, part.end) != (taught.placeholder_start, taught.end):
                continue  # a page of it is gone
            message = _digest(lesson.tokens[taught.placeholder_start : part.end])
            behind = lesson.tokens[part.end : taught.stop].copy()
            rows = self.table.store(taught.key, message, part.length, behind)
            if rows is not None:
                op.anchors.append(AnchorOp(base_load(taught, part), rows))

    def learned(self, lesson: Lesson, report: StepReport) -> None:
        """Nothing is left to be done: rows were assigned before."""

    def failed(self, lesson: Lesson) -> None:
        for span in lesson.spans:
            self.table.forget(span.key)

    def counts(self) -> tuple[int, int]:
        return self.table.counts()

    def clear(self) -> None:
        """Weights or caches were reset: nothing learned holds any more."""
        self.table.clear()


def _digest(tokens: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.asarray(tokens, dtype=np.int32).tobytes())


def _rows(record: PaperRecord) -> list[AnchorRows]:
    return [record.rows[message] for message in record.pool.messages]


def _holder(request_id: str) -> str:
    return f"{request_id} probe"


def _common_suffix(a: np.ndarray, b: np.ndarray) -> int:
    """Equal tokens at the end of both."""
    count = min(len(a), len(b))
    differs = np.flatnonzero(a[len(a) - count :] != b[len(b) - count :])
    return count - int(differs[-1]) - 1 if len(differs) else count
