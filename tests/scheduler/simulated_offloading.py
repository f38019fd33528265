# SPDX-License-Identifier: Apache-2.0
"""The worker of an ``OffloadingConnector`` on simulated pages: copies begin and end as late as
vLLM's own may, so that who has been given their pages meanwhile would be found out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from simulated_memory import PageClaim, SimulatedMemory, Text
from simulated_pool import FIELDS
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
    TransferJob,
)
from vllm.v1.kv_offload.base import get_offload_block_hash


class LateCopies:
    """Args:
    scheduler: the connector's scheduler half, which names what is stored.
    exact_pages: hashes that anybody can compute, and what stands under them.
    most_steps: that a copy takes once it has begun; how many is random.

    Attributes:
        strict: what is stored under an exact hash must be exact. Otherwise, where loads fail for
            good, it is only what is read that must be.
        take: of two numbers of steps, a random one and the most.
        stored: hashes under which pages were stored.
    """

    def __init__(
        self,
        memory: SimulatedMemory,
        scheduler: Any,
        exact_pages: dict[bytes, tuple[Text, int]],
        most_steps: int = 3,
        seed: int = 0,
    ) -> None:
        self.memory = memory
        self.exact_pages = exact_pages
        self.most_steps = most_steps
        self.strict = True
        self.take: Callable[[tuple[int, int]], int] = min
        self.stored: list[bytes] = []
        self._names: dict[int, bytes] = {}  # of chunks
        self._kept: dict[int, list[np.ndarray]] = {}
        self._random = random.Random(seed)
        self._queued: dict[int, TransferJob] = {}  # stores that begin with the next step
        self._going: dict[int, tuple[int, TransferJob, bool]] = {}
        self._done = OffloadingWorkerMetadata()
        self._received: set[str] = set()
        self._watch(scheduler.manager)

    def _watch(self, manager: Any) -> None:
        prepare = manager.prepare_store

        def prepare_store(keys: Any, context: Any) -> Any:
            found = prepare(keys, context)
            if found is not None and found.keys_to_store:
                hashes = map(get_offload_block_hash, found.keys_to_store)
                chunks = found.store_spec.block_ids.tolist()
                self._names.update(zip(chunks, map(bytes, hashes), strict=True))
            return found

        manager.prepare_store = prepare_store

    # ---- in vLLM's order -------------------------------------------------------------------------

    def flush(self, told: OffloadingConnectorMetadata) -> None:
        """``handle_preemptions``: what is to be waited for, before anything else is done."""
        for number in told.jobs_to_flush or ():
            if (job := told.store_jobs.pop(number, None)) is not None:
                self._begin(number, job, stores=True)
        self._begin_queued()
        for number in told.jobs_to_flush or ():
            if number in self._going:
                self._end(number)

    def start(self, told: OffloadingConnectorMetadata) -> None:
        """``start_load_kv``."""
        self._begin_queued()
        for number, job in told.load_jobs.items():
            self._begin(number, job, stores=False)

    def queue(self, told: OffloadingConnectorMetadata) -> None:
        """``wait_for_save``."""
        self._queued.update(told.store_jobs)

    @property
    def going(self) -> dict[int, TransferJob]:
        """Stores that have begun, or will with the next step."""
        stores = {number: job for number, (_, job, stores) in self._going.items() if stores}
        return {**stores, **self._queued}

    def report(self) -> tuple[OffloadingWorkerMetadata | None, set[str]]:
        """At the end of a step: what is over, and which requests have what they waited for."""
        for number, (left, job, stores) in list(self._going.items()):
            if left:
                self._going[number] = left - 1, job, stores
            else:
                self._end(number)
        done, self._done = self._done, OffloadingWorkerMetadata()
        received, self._received = self._received, set()
        return (done if done.completed_jobs else None), received

    def _begin_queued(self) -> None:
        for number, job in self._queued.items():
            self._begin(number, job, stores=True)
        self._queued.clear()

    def _begin(self, number: int, job: TransferJob, stores: bool) -> None:
        steps = self.take((self._random.randint(0, self.most_steps), self.most_steps))
        self._going[number] = steps, job, stores

    def _end(self, number: int) -> None:
        _, job, stores = self._going.pop(number)
        self._done.mark_completed(number)
        here, there = (job.src_spec, job.dst_spec) if stores else (job.dst_spec, job.src_spec)
        pages, chunks = here.block_ids.tolist(), there.block_ids.tolist()
        assert len(pages) == len(chunks) > 0
        size = self.memory.block_size
        rows = [getattr(self.memory, name) for name in FIELDS]
        for page, chunk in zip(pages, chunks, strict=True):
            slots = slice(page * size, (page + 1) * size)
            if stores:
                self._kept[chunk] = [row[slots].copy() for row in rows]
                self._check(page, self._names[chunk])
                continue
            for row, kept in zip(rows, self._kept[chunk], strict=True):
                row[slots] = kept
        if not stores:
            self._received.add(job.req_id)

    def _check(self, page: int, name: bytes) -> None:
        self.stored.append(name)
        if self.strict and name in self.exact_pages:
            text, index = self.exact_pages[name]
            claim = PageClaim(page, text, index, np.inf, "stored under an exact hash")
            self.memory.check_pages([claim])
