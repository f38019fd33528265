# SPDX-License-Identifier: Apache-2.0
"""What a mode is: it makes a plan of the sources found, and may learn from what was served."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Protocol

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.messages import ProbeOp, WorkerFacts
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.fidelity import Ledger
from kvcomm_vllm.scheduler.idle.lesson_queue import LessonQueue
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.planner import Limits, StaleShare, UnseenShare
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan
from kvcomm_vllm.scheduler.state import RequestState


class AskAgain(enum.StrEnum):
    """Why vLLM is to ask about a request once more, next step. Labels of a metric."""

    LOADING = "loading"  # preempted in the step whose loads are on their way
    ADOPTED = "adopted"  # its local hit is to be looked up along its conversation's own pages
    IN_FLIGHT = "in_flight"  # another request is prefilling the same text
    PROBE = "probe"  # workers have been asked how far its text is from what was learned
    STEP_FULL = "step_full"  # other requests' holes fill this step
    RETURNING = "returning"  # pages it would read are on their way from a tier
    NOT_WRITTEN = "not_written"  # a page it would read is filled by this very step


@dataclass(frozen=True)
class Parts:
    """What modes are made of."""

    config: KVCommConfig
    lessons: LessonQueue
    pages: SourcePages
    ledger: Ledger


@dataclass(frozen=True)
class Found:
    """What of a prompt lies in pages, behind ``local`` tokens of vLLM's own prefix cache.

    Args:
        spans: what can be reused, in order.
        limits: the request's; it pays nothing for privacy where it is private already.
        unseen, stale: see :meth:`~kvcomm_vllm.scheduler.context.Context.unseen_share` and
            :meth:`~kvcomm_vllm.scheduler.refresh.Refresh.stale_share`.
    """

    local: int
    spans: Listing[ReuseSpan]
    limits: Limits
    unseen: UnseenShare
    stale: StaleShare


class Mode(Protocol):
    """How spans of one mode are corrected, and what it learns. One instance per engine."""

    def set_capacity(self, facts: Listing[WorkerFacts]) -> None:
        """What workers have room for; called once they are ready."""

    def plan(self, state: RequestState, found: Found) -> Plan | Reason | AskAgain:
        """A plan, or why there is none. May be asked every step: it changes only what is the
        request's own (``planned_placeholders``, ``lesson``, ``mode_data``).
        """

    def admitted(self, state: RequestState, plan: Plan | None) -> None:
        """vLLM has taken the request, with what was planned last or with nothing."""

    def take_probes(self) -> list[ProbeOp]:
        """Questions to the workers, to go out with this step."""

    def on_distances(
        self, request_id: str, state: RequestState | None, found: list[list[float]] | None
    ) -> None:
        """The answer to a probe of any mode, None if it failed; ``state`` is None if the request is
        gone.
        """

    def counts(self) -> tuple[int, int]:
        """(placeholders, anchors) held."""

    def clear(self) -> None:
        """Weights or caches were reset: nothing learned holds any more."""
