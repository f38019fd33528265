# SPDX-License-Identifier: Apache-2.0
"""A host pool whose chunks remember what the pages they were copied from did. In the pool's memory
stands only by which number it is remembered: so slower tiers can take it, and bring it back.

A copy takes some steps, and reads and writes when it ends: who has been given its pages meanwhile
would be found out.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
from simulated_memory import SimulatedMemory

from kvcomm_vllm.messages import StepReport, TransferOp

NUMBERS = itertools.count(1)  # of all engines, which may read each other's
FIELDS = ("written", "token", "position", "context", "exact", "weights", "adapter")


class SimulatedPool:
    """Args:
    view: of the pool's memory, ``[chunks, bytes]``.
    most_steps: that a copy takes; how many is random.

    Attributes:
        fail: which copies are to fail.
        kept: what pages did, by number.
        chunks: those that were written.
    """

    def __init__(
        self,
        memory: SimulatedMemory,
        view: Callable[[], memoryview],
        most_steps: int = 2,
        seed: int = 0,
    ) -> None:
        self.memory = memory
        self.view = view
        self.most_steps = most_steps
        self.fail: Callable[[TransferOp], bool] = lambda op: False
        self.kept: dict[int, list[np.ndarray]] = {}
        self.chunks: set[int] = set()
        self.done: list[TransferOp] = []
        self._random = random.Random(seed)
        self._going: list[tuple[int, TransferOp]] = []
        self._report = StepReport()

    def work(self, ops: list[TransferOp], awaited: list[int]) -> None:
        """What precedes the rest of a step."""
        for op in ops:
            assert len(op.pages) == len(op.chunks) > 0
            self._going.append((self._random.randint(0, self.most_steps), op))
        self._end([op for _, op in self._going if op.number in awaited])

    def report(self) -> StepReport | None:
        """At the end of a step: what is over."""
        self._end([op for left, op in self._going if not left])
        self._going = [(left - 1, op) for left, op in self._going]
        report, self._report = self._report, StepReport()
        return report if report.transferred else None

    def _end(self, over: list[TransferOp]) -> None:
        self._going = [(left, op) for left, op in self._going if op not in over]
        for op in over:
            self._report.transferred[op.number] += 1
            if self.fail(op):
                self._report.untransferred.add(op.number)
            else:
                self._copy(op)
                self.done.append(op)

    def _copy(self, op: TransferOp) -> None:
        size = self.memory.block_size
        rows = [getattr(self.memory, name) for name in FIELDS]
        numbers = np.asarray(self.view())[:, :8].view(np.int64)[:, 0]
        for page, chunk in zip(op.pages, op.chunks, strict=True):
            slots = slice(page * size, (page + 1) * size)
            if op.stores:
                numbers[chunk] = next(NUMBERS)
                self.kept[int(numbers[chunk])] = [row[slots].copy() for row in rows]
                self.chunks.add(chunk)
                continue
            for row, kept in zip(rows, self.kept[int(numbers[chunk])], strict=True):
                row[slots] = kept
