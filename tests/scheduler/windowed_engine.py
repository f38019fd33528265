# SPDX-License-Identifier: Apache-2.0
"""vLLM's real scheduler with its hybrid KV cache manager, beside our connector: one group of full
attention, and others with windows, each with simulated pages of its own.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
from checks import cached_pages, check_all, pages_in_use
from engine_without_worker import HEADS, EngineWithoutWorker, Job
from simulated_memory import PageClaim, Row, SimulatedMemory, Text
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput

from kvcomm_vllm.messages import RequestOps, StepReport
from kvcomm_vllm.worker.holes import forwards_of
from kvcomm_vllm.worker.load import in_group, move_columns


class WindowMemory(SimulatedMemory):
    """Pages of a group whose layers attend to ``window`` tokens; ``full`` are those of the layers
    beside them, with whose tokens all is computed.
    """

    def __init__(
        self, num_blocks: int, block_size: int, group: int, window: int, full: SimulatedMemory
    ) -> None:
        super().__init__(num_blocks, block_size)
        self.group, self.window, self.full = group, window, full

    def load_windows(self, requests: list[RequestOps], texts: dict[str, Text]) -> None:
        """Every source is read before any destination is written."""
        copies = []
        for ops in requests:
            text = texts[ops.request_id]
            for op in ops.loads:
                pair = in_group([(ops, op)], self.group)
                source, target, old, new = move_columns(pair, self.block_size)
                assert (target >= self.block_size).all(), "the null page is written"
                good = self.written[source]
                good &= self.token[source] == text.tokens[new]
                good &= self.position[source] == old
                assert good.all(), f"{ops.request_id} loads what is not there, group {self.group}"
                same = self.context[source] == text.contexts[new]
                copies.append((target, text, new, self.exact[source] & same))
        for target, text, new, exact in copies:
            for slot, place in zip(target, new, strict=True):
                self._write(np.array([slot]), text, int(place), int(place) + 1)
            self.exact[target] = exact

    def attend(self, rows: list[Row], tables: dict[str, list[int]], name: str) -> None:
        """A forward: all rows' KV is written before any of them attends, to its window alone.

        Args:
            tables: block tables of the group of full attention, where they have been computed.
        """
        for row in rows:
            target = self.slots(row.table, row.start, row.end)
            assert (target >= self.block_size).all(), f"{name}: the null page is written"
            self._write(target, row.text, row.start, row.end)
            beside = self.full.slots(tables[row.request_id], row.start, row.end)
            self.exact[target] = self.full.exact[beside]
        for row in rows:
            first = max(0, row.start - self.window + 1)
            read = self.slots(row.table, first, row.end)
            positions = np.arange(first, row.end)
            self._expect(read, row.text, first, positions, f"{name}, window of {row.request_id}")
            exact = self.exact[read] & (self.context[read] == row.text.contexts[first : row.end])
            for at in range(row.start, row.end):
                if exact[at - first]:
                    seen = exact[max(0, at - self.window + 1 - first) : at - first + 1]
                    assert seen.all(), f"{name}: exact on top of what is not"


class WindowedEngine(EngineWithoutWorker):
    """Args: see :class:`EngineWithoutWorker`.
    windows: of the groups behind the first.
    """

    connector_name = "kvcomm_hybrid"
    learns = False
    windows: tuple[int, ...] = (9,)

    def __init__(self, *args: Any, **options: Any) -> None:
        self.windows = options.pop("windows", self.windows)
        super().__init__(*args, **options)
        self.window_memory = {
            group: WindowMemory(len(self.pool.blocks), self.block_size, group, window, self.memory)
            for group, window in enumerate(self.windows, 1)
        }
        self.repaired = 0

    def _groups(self, block_size: int) -> list[KVCacheGroupSpec]:
        full = FullAttentionSpec(block_size=block_size, **HEADS)
        specs = [
            SlidingWindowSpec(block_size=block_size, sliding_window=window, **HEADS)
            for window in self.windows
        ]
        pairs = enumerate([full, *specs])
        return [KVCacheGroupSpec([f"layer {number}"], spec) for number, spec in pairs]

    def _execute(self, job: Job) -> None:
        manager = self.scheduler.kv_cache_manager
        tables = {row.request_id: manager.get_block_ids(row.request_id) for row in job.rows}
        for memory in self.window_memory.values():
            memory.forget(job.new_pages)
        super()._execute(job)
        for group, memory in self.window_memory.items():
            rows = [replace(row, table=tables[row.request_id][group]) for row in job.rows]
            memory.attend(rows, {row.request_id: row.table for row in job.rows}, "forward")

    def _load(self, requests: list[RequestOps], tables: dict[str, list[int]]) -> KVConnectorOutput:
        output = super()._load(requests, tables)
        report = output.kv_connector_worker_meta
        assert isinstance(report, StepReport)
        self.repaired += len(report.repaired)
        texts = {ops.request_id: self.served[ops.request_id].text for ops in requests}
        whole = [ops for ops in requests if ops.request_id not in report.repaired]
        names = {id(ops.block_ids): ops.request_id for ops in requests}
        full = {ops.request_id: ops.block_ids for ops in requests}
        for group, memory in self.window_memory.items():
            memory.load_windows(whole, texts)
            for forward in forwards_of(requests, report.repaired, self.block_size):
                rows = []
                for row in forward:
                    name = names[id(row.block_ids)]
                    rows.append(Row(name, texts[name], row.table(group), row.hole.start, row.end))
                memory.attend(rows, full, "side forward")
        return output


def check_windows(engine: EngineWithoutWorker) -> None:
    """All that holds for one group, and in the others the same of what anybody can look up."""
    assert isinstance(engine, WindowedEngine)
    check_all(engine)
    filling = pages_in_use(engine)
    for group, memory in engine.window_memory.items():
        full, claims = memory.full_pages(), []
        for block_hash, block in cached_pages(engine, group):
            page = block.block_id
            if page not in full and block_hash not in engine.partial_names:
                assert filling[page], f"page {page} of group {group} was never written"
            elif block_hash in engine.exact_pages:
                text, index = engine.exact_pages[block_hash]
                claims.append(PageClaim(page, text, index, inf, f"of group {group}"))
        memory.check_pages(claims)
