# SPDX-License-Identifier: Apache-2.0
"""vLLM's host pool where the KV cache lies in host memory itself: vLLM copies from GPUs alone."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingManager,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class HostPoolSpec(TieringOffloadingSpec):
    """vLLM's spec, with a worker on CPUs, too.

    Attributes:
        fingerprint: of the model and, which is its argument, of the pages' layout.
    """

    fingerprint: Callable[[str], str]

    def manager_over(self, slower: list[dict[str, Any]]) -> OffloadingManager:
        """The scheduler's half, with these tiers behind the pool."""
        self.secondary_tier_configs = slower
        return self.get_manager()

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not current_platform.is_cpu():
            found: OffloadingWorker = super().get_worker(kv_caches)
            return found
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CopyingWorker(kv_caches, region)


class CopyingWorker(OffloadingWorker):
    """Copies pages from memory to memory, in a thread of its own, in the order it is asked.

    Args:
        kv_caches: the KV cache as bytes, ``[pages, bytes]`` per layer.
        region: the pool's memory, of which each layer gets a part of every chunk.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._mmap_region = region
        self._layers = [
            (one.tensor, region.create_next_worker_view(one.page_size_bytes))
            for one in kv_caches.tensors
        ]
        self.page_bytes = sum(cache.shape[1] for cache, _ in self._layers)
        self._thread = ThreadPoolExecutor(1, "kvcomm-host-pool")
        self._jobs: dict[int, tuple[int, Future[float]]] = {}

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        assert isinstance(dst_spec, CPULoadStoreSpec)
        return self._submit(job_id, src_spec.block_ids, dst_spec.block_ids, stores=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        assert isinstance(src_spec, CPULoadStoreSpec)
        return self._submit(job_id, dst_spec.block_ids, src_spec.block_ids, stores=False)

    def _submit(self, job_id: int, pages: np.ndarray, chunks: np.ndarray, stores: bool) -> bool:
        job = self._thread.submit(self._copy, pages, chunks, stores)
        self._jobs[job_id] = len(pages) * self.page_bytes, job
        return True

    def _copy(self, pages: np.ndarray, chunks: np.ndarray, stores: bool) -> float:
        began = time.perf_counter()
        for cache, pool in self._layers:
            here, there = _addresses(cache, pages), _addresses(pool, chunks)
            source, target = (here, there) if stores else (there, here)
            for one, other in zip(target, source, strict=True):
                ctypes.memmove(one, other, cache.shape[1])  # without Python's lock
        return time.perf_counter() - began

    def get_finished(self) -> list[TransferResult]:
        over = [number for number, (_, job) in self._jobs.items() if job.done()]
        return [self._result(number) for number in over]

    def _result(self, number: int) -> TransferResult:
        size, job = self._jobs.pop(number)
        failed = job.exception() is not None
        seconds = None if failed else job.result()
        return TransferResult(number, not failed, size, seconds)

    def wait(self, job_ids: Iterable[int]) -> None:
        for number in job_ids:
            if number in self._jobs:
                self._jobs[number][1].exception()

    def shutdown(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._layers.clear()
        self._mmap_region.cleanup()


def _addresses(rows: torch.Tensor, numbers: np.ndarray) -> list[int]:
    """Where these rows of an int8 tensor begin."""
    found: list[int] = (rows.data_ptr() + numbers.astype(np.int64) * rows.stride(0)).tolist()
    return found
