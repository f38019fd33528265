# SPDX-License-Identifier: Apache-2.0
"""A tier that others have written, of which no failure ends serving: then it is left alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import (
    JobId,
    JobResult,
    ParentManager,
    SecondaryTierManager,
    TransferJob,
)
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

from kvcomm_vllm.wording import one_line

logger = init_logger("vllm.kvcomm")
T = TypeVar("T")


class ForeignTier(SecondaryTierManager):
    """Hands every call on. The first one that raises, or that it cannot be made at all, is told in
    one line; from then on nothing is found or stored there.

    Args:
        tier: as vLLM is told of it.
        number: which of ``tiers.secondary_tiers`` it is.
    """

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        tier: dict[str, Any],
        number: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier["type"], **kwargs)
        self._name = f"tiers.secondary_tiers: number {number} ({one_line(tier['type'], 40)})"
        self._under_way: set[JobId] = set()
        self._refused: set[JobId] = set()
        self._given_up: set[JobId] = set()  # though it may still report them
        self._drained = False
        self._on = True
        self._tier: SecondaryTierManager | None = None
        made = SecondaryTierFactory.create_secondary_tier
        self._tier = self._try(lambda: made(tier, primary_kv_view, offloading_spec), None)
        if self._tier is not None:
            self.locality, self._bp_detector = self._tier.locality, self._tier.bp_detector
            # vLLM reads these of a tier's class
            self.medium = self._tier.medium
            self.cache_hit_source = self._tier.cache_hit_source

    def _try(self, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except Exception as error:  # others' code may raise anything
            if self._on:
                told = one_line(f"{type(error).__name__}: {error}")
                logger.error("kvcomm: %s: %s: it is not used any more", self._name, told)
            self._on = False
            return otherwise

    def _ask(self, method: str, otherwise: T, *args: Any) -> T:
        """What the tier answers, if it is still asked."""
        return self._even_so(method, otherwise, *args) if self._on else otherwise

    def _even_so(self, method: str, otherwise: T, *args: Any) -> T:
        """The same of one that has failed: what it has begun goes on."""
        if self._tier is None:
            return otherwise
        return self._try(lambda: getattr(self._tier, method)(*args), otherwise)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return self._ask("lookup", LookupResult.MISS, key, req_context)

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit("submit_store", job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit("submit_load", job_metadata)

    def _submit(self, method: str, job: TransferJob) -> None:
        self._ask(method, None, job)
        (self._under_way if self._on else self._refused).add(job.job_id)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Also of a tier that has failed: meanwhile it may copy from or to the pool."""
        found: list[JobResult] = []
        if self._tier is not None:
            tier = self._tier
            self._try(lambda: found.extend(tier.get_finished_jobs()), None)
        found = [result for result in found if result.job_id not in self._given_up]
        self._under_way.difference_update(result.job_id for result in found)
        lost, self._refused = self._refused, set()
        if self._drained and not self._on:
            lost, self._under_way = lost | self._under_way, set()
        self._given_up |= lost
        return found + [JobResult(job_id, success=False) for job_id in sorted(lost)]

    def drain_jobs(self) -> None:
        self._even_so("drain_jobs", None)
        self._drained = not self._on

    def has_pending_work(self) -> bool:
        return self._ask("has_pending_work", False)

    def take_events(self) -> Iterable[OffloadingEvent]:
        return self._ask("take_events", ())

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        self._ask("touch", None, keys, req_context)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return self._ask("on_new_request", RequestOffloadingContext(), req_context)

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._ask("on_request_finished", None, req_context)

    def serve_external_requests(self, parent: ParentManager) -> None:
        self._ask("serve_external_requests", None, parent)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._ask("on_schedule_end", None, context)

    def get_stats(self) -> Any:
        return self._ask("get_stats", None)

    def shutdown(self) -> None:
        self._even_so("shutdown", None)
