# SPDX-License-Identifier: Apache-2.0
"""Steps as model runner V2 takes them: vLLM's own class calls our connector, whose worker half does
what real messages say, in simulated memory.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_without_worker import EngineWithoutWorker, Job
from simulated_memory import Row as ComputedRow
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.worker.gpu import kv_connector as runner_v2

from kvcomm_vllm.compat.adapters import NoAdapters
from kvcomm_vllm.connector import KVCommConnector
from kvcomm_vllm.messages import RequestOps
from kvcomm_vllm.worker.half import WorkerHalf
from kvcomm_vllm.worker.side_forward import Row


class SimulatedHalf(WorkerHalf):
    """The worker half over simulated memory.

    Attributes:
        broken: requests that cannot be loaded.
        failures: side forwards that are to fail.
    """

    def attach(self, engine: EngineWithoutWorker) -> None:
        self.engine = engine
        self.broken: set[str] = set()
        self.failures = 0
        equipment: Any = SimpleNamespace(side_forward=self, corrections={})
        self.ready = equipment
        self._names: dict[tuple[int, ...], str] = {}

    def _load(self, requests: list[RequestOps]) -> None:
        memory, served = self.engine.memory, self.engine.served
        if any(ops.loads and ops.request_id in self.broken for ops in requests):
            memory.spoil(requests)
            raise RuntimeError("page lost")
        memory.load(requests, {ops.request_id: served[ops.request_id].text for ops in requests})
        for ops in requests:
            served[ops.request_id].loaded.append(ops)

    def _fill_holes(self, requests: list[RequestOps], *given: Any) -> None:
        self.engine.memory.garbage = False  # nothing may be read before it is computed
        self._names = {tuple(ops.block_ids): ops.request_id for ops in requests}
        super()._fill_holes(requests, *given)

    def run_rows(self, rows: list[Row]) -> None:
        found = []
        for row in rows:
            name = self._names[tuple(row.block_ids)]
            text = self.engine.served[name].text
            assert row.hole.tokens == np.asarray(text.tokens[row.hole.start : row.end]).tolist()
            found.append(ComputedRow(name, text, row.block_ids, row.hole.start, row.end))
        self.engine.memory.forward(found, "side forward")


class SideForward:
    """What :class:`SimulatedHalf` computes with."""

    adapters = NoAdapters()

    def __init__(self, half: SimulatedHalf) -> None:
        self.half = half

    def run(self, rows: list[Row], eager: bool = False) -> None:
        if self.half.failures:
            self.half.failures -= 1
            self.half.engine.memory.garbage = True
            raise RuntimeError("no memory")
        self.half.run_rows(rows)


def call_as_runner_v2(engine: EngineWithoutWorker, patch: pytest.MonkeyPatch) -> SimulatedHalf:
    """From now on the engine's steps are called so; returns the worker half that does them."""
    scheduler = engine.scheduler
    config = scheduler.vllm_config
    connector = KVCommConnector(config, KVConnectorRole.WORKER, scheduler.kv_cache_config)
    half = connector._worker = SimulatedHalf(connector.config, config, engine.block_size)
    patch.setattr(runner_v2, "get_kv_transfer_group", lambda: connector)
    active = runner_v2.ActiveKVConnector(config, {})
    half.attach(engine)
    half.equipment.side_forward = SideForward(half)  # type: ignore[misc]
    execute, steps = engine._execute, list[Job]()

    def work(*given: Any) -> None:
        active.pre_forward(steps[-1].output)

    def executed(job: Job) -> None:
        steps.append(job)
        execute(job)
        active.finish_forward()
        assert job.result is not None
        job.result.kv_connector_output = active.post_forward(job.output.finished_req_ids)

    patch.setattr(engine, "work", work)
    patch.setattr(engine, "_execute", executed)
    return half
