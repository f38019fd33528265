# SPDX-License-Identifier: Apache-2.0
"""What the scheduler half remembers of one request between vLLM's calls."""

from __future__ import annotations

import hmac
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.request import RequestStatus

from kvcomm_vllm.compat.adapters import adapter_names
from kvcomm_vllm.compat.scheduler import count_cached_tokens
from kvcomm_vllm.hints import Hints
from kvcomm_vllm.messages import Adapter
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.context import Context
from kvcomm_vllm.scheduler.fidelity import Use
from kvcomm_vllm.scheduler.index import Match, Origin, Sequence
from kvcomm_vllm.scheduler.origin import origin_by
from kvcomm_vllm.scheduler.planner import Limits
from kvcomm_vllm.scheduler.promoted import Promoted
from kvcomm_vllm.scheduler.refresh import Refresh
from kvcomm_vllm.scheduler.repeats import repeats
from kvcomm_vllm.scheduler.spans import Plan, Treatment
from kvcomm_vllm.scheduler.taint import Taint
from kvcomm_vllm.scheduler.window_pages import PlanWindows

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvcomm_vllm.scheduler.idle.lesson import Lesson


def namespace_of(request: Request, secret: bytes, adapter: Adapter | None = None) -> bytes:
    """Tenant key: text is shared only among requests with the same cache salt, and of those only
    among requests with the same weights: without adapter, or with one of this number, version, name
    and path.

    Keyed, so that nothing derived from it can be computed, or a salt guessed, outside this process.
    """
    said = repr(request.cache_salt)
    if adapter is not None:  # a tuple: no salt looks like one
        of_adapter = (adapter.number, adapter.version, adapter_names(request))
        said = repr((request.cache_salt, of_adapter))
    return hmac.digest(secret, said.encode(), "sha256")[:16]


@dataclass(slots=True)
class RequestState:
    """One request.

    Attributes:
        limits: None where reuse is off for this request; ``off`` then says why.
        adapter: with which its KV is computed; None for the model as it is.
        trusted: its sender may know what is shared: only those who know its cache salt share with
            it, or the operator allows it.
        plan: made by the current scheduling attempt, not admitted yet.
        windows: pages of windowed layers, of that plan, or of the one that is being loaded.
        block_ids: its block table at its last admission.
        loading: operations are on their way to the workers; ``awaited``: over several steps.
        supplied: another connector loads, or has loaded, for its last admission.
        hits: tokens to be loaded by them that vLLM has counted as hits.
        served: the plan of the first admission, ``served_local`` its local hit, of which
            ``served_approximate`` tokens are approximate: what the report speaks of.
        confirmed, failed: the workers' word on that plan; ``repaired``: they computed what they
            could not load.
        told: the report has gone out with the first output.
        sequence: what the index holds of this request.
        first_approximate: first token whose KV is approximate; None while all of it is exact.
        generation, origin: see :class:`~kvcomm_vllm.scheduler.index.sequence.Sequence`;
            ``local_origin``: that of the conversation whose private pages it continues.
        planned_placeholders: keys of the last plan's spans, ``placeholders`` of the served one's.
        places: of the last plan's spans start, end, and start and key of their placeholders.
        uses: how the last plan treats each placeholder, ``reused_uses`` of the served one those
            that it reuses.
        lesson: what can be learned from the last plan.
        near: lines of the report about text stored in another rendering; None where not looked for.
        mode_data: what its mode keeps of it.
        arrived: by the engine's monotonic clock; ``waited``: for how many seconds until it was
            admitted; ``promoted``: what came back for it meanwhile.
    """

    request: Request
    limits: Limits | None
    off: Reason | None
    hints: Hints
    mode: str
    shareable: bool
    trusted: bool
    message: str
    namespace: bytes
    adapter: Adapter | None
    taint: Taint
    local: int = 0
    plan: Plan | None = None
    windows: PlanWindows | None = None
    admitted: bool = False
    block_ids: list[int] = field(default_factory=list)
    loading: bool = False
    awaited: bool = False
    supplied: bool = False
    hits: int = 0
    served: Plan | None = None
    served_local: int = 0
    served_approximate: int = 0
    confirmed: bool = False
    failed: bool = False
    repaired: bool = False
    told: bool = False
    sequence: Sequence | None = None
    prefill_tokens: int = 0
    first_approximate: int | None = None
    generation: int = 0
    origin: Origin | None = None
    local_origin: Origin | None = None
    adoption_tried: bool = False
    wait_until: float | None = None
    matches: list[Match] = field(default_factory=list)
    matches_key: tuple[int, int, int, bool] | None = None
    context: Context | None = None
    refresh: Refresh | None = None
    planned_placeholders: list[str] = field(default_factory=list)
    placeholders: list[str] = field(default_factory=list)
    places: list[tuple[int, int, int, str]] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    reused_uses: list[Use] = field(default_factory=list)
    lesson: Lesson | None = None
    mode_data: object | None = None
    declined: Counter[str] = field(default_factory=Counter)
    near: list[list[int | float | str]] | None = None
    arrived: float = field(default_factory=time.monotonic)
    waited: float | None = None
    promoted: Promoted | None = None
    _tokens: np.ndarray | None = None

    @classmethod
    def new(cls, request: Request, **fields: Any) -> RequestState:
        state = cls(
            request=request,
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

    def admit(self) -> bool:
        """vLLM takes it up; whether for the first time, or as if it were."""
        if self.admitted:
            return False
        self.admitted, self.waited = True, time.monotonic() - self.arrived
        return True

    # ---- exact or private ------------------------------------------------------------------------

    def is_private(self, local: int, block_size: int) -> bool:
        """Whether the local hit itself is approximate (this conversation's own private pages)."""
        first = self.taint.first_block
        return first is not None and local > first * block_size

    def make_private(self, first_approximate: int | None, block_size: int) -> None:
        self.first_approximate = first_approximate
        if first_approximate is not None:
            self.taint.apply(first_approximate // block_size)

    @property
    def torn_pages(self) -> list[int]:
        """Pages of its plan that are not whole, though vLLM has named them."""
        return [] if self.windows is None else self.windows.torn

    def restore_exact(self) -> None:
        self.taint.restore()
        self.first_approximate, self.generation, self.local_origin = None, 0, None

    def withdraw(self, reason: Reason) -> None:
        """From now on it reads nothing of others, others read nothing of it, and nothing is learned
        from it.
        """
        self.limits, self.shareable, self.lesson = None, False, None
        if not self.admitted:
            self.restore_exact()
            self.decline(reason)

    def origin_by(self, plan: Plan | None) -> Origin | None:
        """What ``origin`` is once it is served by this plan; None where all of it is exact."""
        if self.first_approximate is None:
            return None
        own = repeats(self.tokens()) if self.refresh is None else self.refresh.repeats
        local = self.local_origin
        return origin_by(self.tokens(), own, plan, None if local is None else local[: self.local])

    # ---- the report ------------------------------------------------------------------------------

    @property
    def written(self) -> bool:
        """Whether the plan's KV is there. A request that has output without a failure has it: vLLM
        withholds the output of a step that lost KV, but ends a one-token request before it passes
        the workers' word on.
        """
        done = self.confirmed or self.request.num_output_tokens > 0
        return done and not self.failed

    @property
    def reused(self) -> Plan | None:
        """The plan that was carried out."""
        return self.served if self.written and not self.repaired else None

    def decline(self, reason: Reason) -> None:
        self.declined = Counter({reason.value: 1})  # of attempts, only the last one counts

    def computed_instead(self) -> None:
        """Its loads have failed; all of its plan was computed in the same step."""
        self.repaired, self.reused_uses = True, []
        self.decline(Reason.LOAD_REPAIRED)
        count_cached_tokens(self.request, self.served_local, 0)

    def compute_from(self, tokens: int) -> None:
        """Behind so many tokens its pages are lost, and if it runs it computes them itself.

        vLLM (0.28 - 0.33) has the first request on lost pages compute them and lets the others go
        on as if it had; it may be aborted before, or be slower. The pages have lost their names,
        and what is written twice is the same.
        """
        if self.request.status == RequestStatus.RUNNING:
            self.request.num_computed_tokens = min(self.request.num_computed_tokens, tokens)

    def not_loaded(self) -> None:
        """Its loads have failed, and vLLM computes what was to be loaded."""
        self.failed, self.awaited = True, False
        self.decline(Reason.LOAD_FAILED)
        count_cached_tokens(self.request, self.served_local, 0)

    @property
    def outcome(self) -> str:
        """Label of the request counter.

        ``aborted`` ended before anybody could say whether it would reuse: in the queue, or while
        its loads were on their way. A load whose failure ends its request (vLLM's status is then
        an error) is known to vLLM earlier than to us.
        """
        if self.off is not None:
            return "off"
        if self.failed or self.repaired:
            return "failed"
        if not self.admitted:
            return "aborted"
        if self.served is None:
            return "declined"
        if self.reused is not None:
            return "reused"
        return "aborted" if self.request.status == RequestStatus.FINISHED_ABORTED else "failed"

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
        plan = self.reused
        spans = self.treatments()
        return self._report(self.counts()) | {
            **self.parts(),
            "generation": self.generation,
            "seam": plan.seam_tokens if plan else 0,
            "refreshed": plan.refreshed_tokens if plan else 0,
            "gap": plan.gap_tokens if plan else 0,
            "spans": [[start, end, treatment.value] for start, end, treatment in spans],
            "placeholders": self.placeholders if plan else [],
        }

    def coarse_report(self, block_size: int) -> dict[str, Any]:
        """The same where others' text is to stay secret: whole pages, and not which ones."""
        counts = self.counts()
        beyond = counts["reused"] % block_size
        counts["reused"] -= beyond
        counts["computed"] += beyond
        return self._report(counts)

    def counts(self) -> dict[str, int]:
        """Prompt tokens by treatment."""
        counts = {treatment.value: 0 for treatment in Treatment}
        for start, end, treatment in self.treatments():
            counts[treatment.value] += end - start
        return counts

    def parts(self) -> dict[str, int]:
        """What of these is approximate beyond the moving, or corrected."""
        plan = self.reused
        return {
            "corrected": plan.corrected_tokens if plan else 0,
            "from_approximate": plan.tokens_from_approximate if plan else 0,
            "local_approximate": self.served_approximate,
        }

    def _report(self, counts: dict[str, int]) -> dict[str, Any]:
        report: dict[str, Any] = {
            "mode": self.mode,
            "prompt_tokens": self.request.num_prompt_tokens,
            **counts,
            "declined": dict(self.declined),
        }
        if self.hints.agent is not None:
            report["agent"] = self.hints.agent
        if self.near is not None:
            report["near"] = self.near
        if self.message:
            report["message"] = self.message
        return report
