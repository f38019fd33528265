# SPDX-License-Identifier: Apache-2.0
"""vLLM's file tier, with pages that are checked, for their owner's eyes alone, and bounded.

vLLM's (``tiering/fs``) finds, queues, reads and writes; a file holds a page, and is named by it.
Behind the page stands its digest here, which plain vLLM does not look at: it can read these files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

from vllm.logger import init_logger
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from kvcomm_vllm.compat.offload import dropped_pages
from kvcomm_vllm.scheduler.tiers.checked import TAIL, pages_of, tail_of
from kvcomm_vllm.scheduler.tiers.room import SharedRoom

logger = init_logger("vllm.kvcomm")

FULL_SECONDS = 60

Pages: TypeAlias = list[tuple[Path, memoryview]]


class DiskTier(FileSystemTierManager):
    """Args:
    root_dir: the folder.
    max_bytes: most that its pages have, those of other engines included.
    """

    def __init__(self, *args: Any, root_dir: str, max_bytes: int, **kwargs: Any) -> None:
        before = os.umask(0o077)
        try:
            super().__init__(
                *args, root_dir=root_dir, n_read_threads=2, n_write_threads=1, **kwargs
            )
        finally:
            os.umask(before)
        self._room = SharedRoom(Path(root_dir), max_bytes)
        self._full_until = 0.0
        self._dropped: SimpleQueue[int] = SimpleQueue()  # from the thread that stores

    def get_stats(self) -> Any:
        dropped = sum(self._dropped.get() for _ in range(self._dropped.qsize()))
        return dropped_pages(self.tier_type, dropped)

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, self._store, self._pool.enqueue_store)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._load_job_keys[job_metadata.job_id] = list(job_metadata.keys)
        self._submit(job_metadata, self._load, self._pool.enqueue_load)

    def _submit(self, job: TransferJob, work: Callable[[int, Pages], None], enqueue: Any) -> None:
        paths = [Path(self.file_mapper.get_file_name(key)) for key in job.keys]
        pages = list(zip(paths, pages_of(job, self._primary_kv_view), strict=True))
        self._job_block_counts[job.job_id] = len(pages)
        enqueue(job.job_id, 1, [partial(work, job.job_id, pages)])

    def _load(self, job_id: int, pages: Pages) -> None:
        """In a thread: page by page, until one cannot be read."""
        for number, (path, page) in enumerate(pages):
            self._load_progress[job_id] = number
            load_page(path, page)
        self._load_progress.pop(job_id)

    def _store(self, job_id: int, pages: Pages) -> None:
        """In a thread. What is not stored is not found later, which is no failure: a full disk is
        told of once in a while, and left alone meanwhile.
        """
        if time.monotonic() < self._full_until:
            return
        try:
            for path, page in pages:
                if not path.exists() and (gone := self._room.take(page.nbytes + TAIL)):
                    self._dropped.put(gone)
                store_page(path, page)
        except OSError as error:
            self._full_until = time.monotonic() + FULL_SECONDS
            logger.warning("kvcomm: nothing is kept on disk for %d s: %s", FULL_SECONDS, error)


def store_page(path: Path, page: memoryview) -> None:
    """Write a page under its name at once or not at all; one that is there is left.

    Raises:
        OSError: it cannot be written (a full disk); nothing is left of it.
    """
    if path.exists():
        os.utime(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        with open(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(page)
            file.write(tail_of(path.name, page))
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def load_page(path: Path, page: memoryview) -> None:
    """Read a page, and make it the one used last.

    Raises:
        OSError: it is not there, or not what was stored under this name; then it is removed.
    """
    with open(path, "rb", buffering=0) as file:
        read = file.readinto(page)
        tail = file.read(TAIL + 1)
    if read != page.nbytes or tail != tail_of(path.name, page):
        path.unlink(missing_ok=True)
        raise OSError(f"{path.name} is not the page that was stored: removed, it is computed")
    os.utime(path)
