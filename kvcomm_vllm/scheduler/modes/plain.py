# SPDX-License-Identifier: Apache-2.0
"""Modes ``rotate`` and ``seam``: KV is moved as it is, behind seams of none or some tokens."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing

from kvcomm_vllm.messages import ProbeOp, WorkerFacts
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.fidelity import Level
from kvcomm_vllm.scheduler.modes.base import AskAgain, Found, Parts
from kvcomm_vllm.scheduler.modes.limited import uses_of, with_longer_seams, without_computed
from kvcomm_vllm.scheduler.modes.placeholders import Placeholder, placeholders
from kvcomm_vllm.scheduler.planner import make_plan
from kvcomm_vllm.scheduler.spans import Plan
from kvcomm_vllm.scheduler.state import RequestState


class PlainMode:
    """Corrects nothing and learns nothing; a mode that does builds upon it."""

    def __init__(self, parts: Parts) -> None:
        self.config = parts.config
        self.lessons = parts.lessons
        self.pages = parts.pages
        self.ledger = parts.ledger

    def set_capacity(self, facts: Listing[WorkerFacts]) -> None:
        """Nothing is kept."""

    def plan(self, state: RequestState, found: Found) -> Plan | Reason | AskAgain:
        """The spans with the best balance of what they save and what they cost."""
        total = len(state.tokens())
        judges = found.unseen, found.stale
        plan = make_plan(found.local, found.spans, total, found.limits, *judges)
        if isinstance(plan, Reason):
            return plan
        there = placeholders(plan, state.tokens(), state.namespace, self.known)
        state.planned_placeholders = _keys(there)
        uses = uses_of(self.ledger, plan, there)
        state.uses = [use for use in dict.fromkeys(uses) if use.key]
        left = without_computed(plan, there, uses, found, total)
        if isinstance(left, Reason):
            return left
        plan, there, uses = left
        made = self.corrected(state, plan, there)
        if not isinstance(made, Reason):
            made = with_longer_seams(made, there, uses, self.config.seam_tokens, found, total)
        if not isinstance(made, Reason):
            ends = {span.end for span in made.spans}
            rows = zip(plan.spans, there, strict=True)
            places = [(span, one) for span, one in rows if span.end in ends]
            state.planned_placeholders = _keys(one for _, one in places)
            state.places = [(s.start - s.seam, s.end, one.start, one.key) for s, one in places]
        return made

    def known(self, key: str) -> bool:
        """Whether something was learned for a placeholder."""
        return False

    def corrected(
        self, state: RequestState, plan: Plan, placeholders: list[Placeholder]
    ) -> Plan | Reason:
        """The plan with its corrections, or why the request is served exactly."""
        return Reason.LEARNING if state.hints.learn else plan

    def admitted(self, state: RequestState, plan: Plan | None) -> None:
        """Its placeholders have occurred once more."""
        self.ledger.served(use.key for use in state.uses)
        state.reused_uses = []
        if plan is not None:
            reused = set(state.planned_placeholders)
            left = (use for use in state.uses if use.key in reused)
            state.reused_uses = [use for use in left if use.level is not Level.COMPUTED]

    def take_probes(self) -> list[ProbeOp]:
        return []

    def on_distances(
        self, request_id: str, state: RequestState | None, found: list[list[float]] | None
    ) -> None:
        """Nobody was asked."""

    def counts(self) -> tuple[int, int]:
        return 0, 0

    def clear(self) -> None:
        """Nothing was learned but what audits have found."""
        self.ledger.clear()


def _keys(there: Iterable[Placeholder]) -> list[str]:
    """One for each place, however many spans its text has."""
    return [placeholder.key for placeholder in dict.fromkeys(there)]
