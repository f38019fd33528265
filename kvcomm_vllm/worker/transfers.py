# SPDX-License-Identifier: Apache-2.0
"""Transfers between the KV cache and its host pool: begun before a step's forward, they go on
beside it, and are reported when they are over.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from kvcomm_vllm.compat.offload import close_worker, pages_and_chunks
from kvcomm_vllm.messages import StepReport, TransferOp

logger = init_logger("vllm.kvcomm.worker")


class Transfers:
    """Those of one rank.

    Args:
        worker: vLLM's ``OffloadingWorker``, which copies.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._stores: set[int] = set()
        self._refused: list[int] = []

    def begin(self, ops: list[TransferOp], awaited: list[int]) -> None:
        """Begin these, and wait for the ends of others: of their pages the step has need."""
        for op in ops:
            there, pool = pages_and_chunks(op.pages, op.chunks)
            try:
                if op.stores:
                    self._worker.submit_store(op.number, there, pool)
                    self._stores.add(op.number)
                else:
                    self._worker.submit_load(op.number, pool, there)
            except Exception:
                logger.exception("kvcomm: %d page(s) were not copied", len(op.pages))
                self._refused.append(op.number)
        if awaited:
            self._worker.wait(set(awaited))

    def report(self, report: StepReport | None, count: Any) -> StepReport | None:
        """The report with what is over, if anything is.

        Args:
            count: is told of each: whether it stored, bytes, seconds.
        """
        over = self._worker.get_finished()
        if not over and not self._refused:
            return report
        report = report or StepReport()
        for number in self._refused:
            report.transferred[number] += 1
            report.untransferred.add(number)
        self._refused.clear()
        for one in over:
            report.transferred[one.job_id] += 1
            if not one.success:
                report.untransferred.add(one.job_id)
            stored = one.job_id in self._stores
            self._stores.discard(one.job_id)
            if one.success:
                count(stored, one.transfer_size or 0, one.transfer_time or 0.0)
        return report

    def close(self) -> None:
        close_worker(self._worker)
