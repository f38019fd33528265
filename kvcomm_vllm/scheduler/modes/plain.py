# SPDX-License-Identifier: Apache-2.0
"""Modes ``rotate`` and ``seam``: KV is moved as it is, behind seams of none or some tokens."""

from __future__ import annotations

from collections.abc import Sequence as Listing

from kvcomm_vllm.messages import ProbeOp, WorkerFacts
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.modes.base import AskAgain, Found, Parts
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
        state.planned_placeholders = [one.key for one in there]
        return self.corrected(state, plan, there)

    def known(self, key: str) -> bool:
        """Whether something was learned for a placeholder."""
        return False

    def corrected(
        self, state: RequestState, plan: Plan, placeholders: list[Placeholder]
    ) -> Plan | Reason:
        """The plan with its corrections, or why the request is served exactly."""
        return Reason.LEARNING if state.hints.learn else plan

    def admitted(self, state: RequestState, plan: Plan | None) -> None:
        """Nothing is counted."""

    def take_probes(self) -> list[ProbeOp]:
        return []

    def on_distances(
        self, request_id: str, state: RequestState | None, found: list[list[float]] | None
    ) -> None:
        """Nobody was asked."""

    def counts(self) -> tuple[int, int]:
        return 0, 0

    def clear(self) -> None:
        """Nothing was learned."""
