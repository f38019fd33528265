# SPDX-License-Identifier: Apache-2.0
"""Pages in a server that speaks Valkey's and Redis' protocol, for engines on several machines.

A page lies there under its name, with its digest behind it, for a limited time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import (
    JobId,
    JobResult,
    SecondaryTierManager,
    TransferJob,
)
from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool

from kvcomm_vllm.compat.offload import name_of
from kvcomm_vllm.scheduler.tiers.checked import TAIL, pages_of, tail_of
from kvcomm_vllm.scheduler.tiers.server import AwayError, SharedServer

logger = init_logger("vllm.kvcomm")
SENT_BYTES = 8 << 20  # at once; a server that works has answered in time


@dataclass
class Job:
    """Pages on their way.

    Attributes:
        done: keys of those that have arrived.
    """

    loads: bool
    keys: list[OffloadKey]
    pages: list[memoryview]
    done: list[OffloadKey] = field(default_factory=list)

    def parts(self) -> Iterator[list[tuple[OffloadKey, str, memoryview]]]:
        """Key, name and page, as many as are sent at once."""
        names = [name_of(key).hex() for key in self.keys]
        all_of_it = list(zip(self.keys, names, self.pages, strict=True))
        step = max(1, SENT_BYTES // self.pages[0].nbytes)
        for start in range(0, len(all_of_it), step):
            yield all_of_it[start : start + step]


class Lookups(AsyncLookupManager):
    """Args:
    there: tells, in another thread, which of these pages there are.
    """

    def __init__(self, tier_type: str, there: Callable[[list[OffloadKey]], list[bool]]) -> None:
        self._there = there
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> list[bool]:
        return self._there(keys)


class ValkeyTier(SecondaryTierManager):
    """Args:
    server: where pages lie; whoever finds it away goes on without.
    prefix: of the names of all pages that are of this model and layout.
    ttl_seconds: how long a page stays after it was last asked for.
    """

    def __init__(
        self, *args: Any, server: SharedServer, prefix: str, ttl_seconds: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._server = server
        self._prefix = prefix
        self._ttl = ttl_seconds
        self._jobs: dict[JobId, Job] = {}
        self._threads = DualQueueThreadPool(2, 1, thread_name_prefix="kvcomm_valkey")
        self._lookups = Lookups(self.tier_type, self._there)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        job = self._begin(job_metadata)
        self._threads.enqueue_store(job_metadata.job_id, 1, [partial(self._store, job)])

    def submit_load(self, job_metadata: TransferJob) -> None:
        job = self._begin(job_metadata)
        self._threads.enqueue_load(job_metadata.job_id, 1, [partial(self._load, job)])

    def _begin(self, given: TransferJob) -> Job:
        pages = pages_of(given, self._primary_kv_view)
        job = Job(given.is_promotion, list(given.keys), pages)
        self._jobs[given.job_id] = job
        return job

    def get_finished_jobs(self) -> list[JobResult]:
        return [
            self._result(job_id, self._jobs.pop(job_id), seconds)
            for job_id, _, seconds in self._threads.get_finished()
        ]

    def _result(self, job_id: JobId, job: Job, seconds: float) -> JobResult:
        lacking = set(job.keys).difference(job.done)
        if job.loads:
            self._lookups.mark_miss(lacking)
        return JobResult(
            job_id,
            success=not lacking,
            successful_keys=tuple(job.done) if job.loads and lacking and job.done else None,
            transfer_time=seconds,
            transfer_bytes=len(job.done) * self.block_size_bytes,
        )

    def drain_jobs(self) -> None:
        self._threads.wait_idle()

    def shutdown(self) -> None:
        self._server.close()
        self._lookups.shutdown()
        self._threads.shutdown(wait=True)

    # ---- in threads, where whatever is not done has failed --------------------------------------

    def _there(self, keys: list[OffloadKey]) -> list[bool]:
        try:
            asked = (("EXISTS", self._prefix + name_of(key).hex()) for key in keys)
            return [reply == 1 for reply in self._server.ask(*asked)]
        except AwayError:
            return [False] * len(keys)

    def _store(self, job: Job) -> None:
        with suppress(AwayError):
            for part in job.parts():
                if self._server.full.on or not self._store_part(part):
                    return
                job.done += [key for key, _, _ in part]

    def _store_part(self, part: list[tuple[OffloadKey, str, memoryview]]) -> bool:
        """Only what is not there is sent."""
        began = time.monotonic()
        asked = (("EXPIRE", self._prefix + name, self._ttl) for _, name, _ in part)
        there = [reply == 1 for reply in self._server.ask(*asked)]
        sent = [
            ("SET", self._prefix + name, b"".join((page, tail_of(name, page))), "EX", self._ttl)
            for found, (_, name, page) in zip(there, part, strict=True)
            if not found
        ]
        refused = [reply for reply in self._server.ask(*sent) if isinstance(reply, Exception)]
        if refused:
            self._server.full.failed(refused[0])
        elif sent:
            self._server.full.worked(began)
        return not refused

    def _load(self, job: Job) -> None:
        with suppress(AwayError):
            for part in job.parts():
                job.done += self._load_part(part)

    def _load_part(self, part: list[tuple[OffloadKey, str, memoryview]]) -> list[OffloadKey]:
        """Those that are there and what was stored; others are removed."""
        done, wrong = [], []
        asked = (("GETEX", self._prefix + name, "EX", self._ttl) for _, name, _ in part)
        for reply, (key, name, page) in zip(self._server.ask(*asked), part, strict=True):
            if isinstance(reply, bytes) and _copied(reply, name, page):
                done.append(key)
            elif reply is not None:
                wrong.append(self._prefix + name)
        if wrong:
            logger.warning("kvcomm: %d pages in the shared tier were damaged: removed", len(wrong))
            self._server.ask(("DEL", *wrong))
        return done


def _copied(found: bytes, name: str, page: memoryview) -> bool:
    """Whether this is the page that was stored under its name; then it has been copied."""
    body = memoryview(found)[:-TAIL]
    if body.nbytes != page.nbytes or found[-TAIL:] != tail_of(name, body):
        return False
    page[:] = body
    return True
