# SPDX-License-Identifier: Apache-2.0
"""What the scheduler half remembers of one request between vLLM's calls."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from kvcomm_vllm.hints import Hints
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.index import Match, Sequence
from kvcomm_vllm.scheduler.planner import Limits
from kvcomm_vllm.scheduler.spans import Plan, Treatment
from kvcomm_vllm.scheduler.taint import Taint

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvcomm_vllm.anchors.lesson import Lesson
    from kvcomm_vllm.anchors.paper_mode import Probe, Verdict


def namespace_of(request: Request) -> bytes:
    """Tenant key: text is shared only among requests with the same cache salt."""
    return xxhash.xxh3_128_digest(repr(request.cache_salt).encode())


@dataclass(slots=True)
class RequestState:
    """One request.

    Attributes:
        limits: None where reuse is off for this request; ``off`` then says why.
        plan: made by the current scheduling attempt, not admitted yet.
        block_ids: its block table at its last admission.
        loading: operations are on their way to the workers.
        served: the plan of the first admission, ``served_local`` its local hit: what the report
            speaks of.
        confirmed, failed: the workers' word on that plan.
        told: the report has gone out with the first output.
        sequence: what the index holds of this request.
        first_approximate: first token whose KV is approximate; None while all of it is exact.
        planned_slots: keys of the last plan's spans, ``slots`` of the served one's.
        lesson: what can be learned from the last plan.
        probe, verdicts: what mode ``paper`` asked the workers, and what its gate said.
    """

    request: Request
    limits: Limits | None
    off: Reason | None
    hints: Hints
    mode: str
    shareable: bool
    message: str
    namespace: bytes
    taint: Taint
    local: int = 0
    plan: Plan | None = None
    admitted: bool = False
    block_ids: list[int] = field(default_factory=list)
    loading: bool = False
    served: Plan | None = None
    served_local: int = 0
    confirmed: bool = False
    failed: bool = False
    told: bool = False
    sequence: Sequence | None = None
    prefill_tokens: int = 0
    first_approximate: int | None = None
    adoption_tried: bool = False
    wait_until: float | None = None
    matches: list[Match] = field(default_factory=list)
    matches_key: tuple[int, int, int, bool] | None = None
    planned_slots: list[str] = field(default_factory=list)
    slots: list[str] = field(default_factory=list)
    lesson: Lesson | None = None
    probe: Probe | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    declined: Counter[str] = field(default_factory=Counter)
    _tokens: np.ndarray | None = None

    @classmethod
    def new(cls, request: Request, **fields: Any) -> RequestState:
        state = cls(
            request=request,
            namespace=namespace_of(request),
            taint=Taint(request, os.urandom(16)),
            **fields,
        )
        if state.off is not None:
            state.decline(state.off)
        return state

    @property
    def id(self) -> str:
        return str(self.request.request_id)

    def tokens(self) -> np.ndarray:
        """All token ids so far, int32 ``[num_tokens]``."""
        count = self.request.num_tokens
        if self._tokens is None or len(self._tokens) != count:
            self._tokens = np.asarray(self.request.all_token_ids[:count], dtype=np.int32)
        return self._tokens

    # ---- exact or private ------------------------------------------------------------------------

    def is_private(self, local: int, block_size: int) -> bool:
        """Whether the local hit itself is approximate (this conversation's own private pages)."""
        first = self.taint.first_block
        return first is not None and local > first * block_size

    def make_private(self, first_approximate: int | None, block_size: int) -> None:
        self.first_approximate = first_approximate
        if first_approximate is not None:
            self.taint.apply(first_approximate // block_size)

    def restore_exact(self) -> None:
        self.taint.restore()
        self.first_approximate = None

    # ---- the report ------------------------------------------------------------------------------

    @property
    def reused(self) -> Plan | None:
        """The plan that was carried out. A request that has output without a failure was loaded:
        vLLM withholds the output of a step whose loads failed, but ends a one-token request before
        it passes the workers' word on.
        """
        done = self.confirmed or self.request.num_output_tokens > 0
        return self.served if done and not self.failed else None

    def decline(self, reason: Reason) -> None:
        self.declined = Counter({reason.value: 1})  # of attempts, only the last one counts

    @property
    def outcome(self) -> str:
        """Label of the request counter."""
        if self.off is not None:
            return "off"
        if self.served is None:
            return "declined"
        return "reused" if self.reused else "failed"

    def treatments(self) -> list[tuple[int, int, Treatment]]:
        """Spans of the prompt as it was served."""
        total = self.request.num_prompt_tokens
        if self.reused is not None:
            return self.reused.treatments(total)
        local = min(self.served_local, total)
        spans = [(0, local, Treatment.LOCAL), (local, total, Treatment.COMPUTE)]
        return [span for span in spans if span[0] < span[1]]

    def report(self) -> dict[str, Any]:
        """The ``kv_transfer_params.kvcomm`` of the response."""
        spans = self.treatments()
        counts = {treatment.value: 0 for treatment in Treatment}
        for start, end, treatment in spans:
            counts[treatment.value] += end - start
        plan = self.reused
        report: dict[str, Any] = {
            "mode": self.mode,
            "prompt_tokens": self.request.num_prompt_tokens,
            **counts,
            "corrected": plan.corrected_tokens if plan else 0,
            "from_approximate": plan.tokens_from_approximate if plan else 0,
            "seam": plan.seam_tokens if plan else 0,
            "gap": plan.hole_tokens - plan.seam_tokens if plan else 0,
            "spans": [[start, end, treatment.value] for start, end, treatment in spans],
            "slots": self.slots if plan else [],
            "declined": dict(self.declined),
        }
        if self.hints.agent is not None:
            report["agent"] = self.hints.agent
        if self.message:
            report["message"] = self.message
        return report
