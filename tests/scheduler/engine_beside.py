# SPDX-License-Identifier: Apache-2.0
"""vLLM's real scheduler with our connector and an ``OffloadingConnector``, both of them parts of a
``MultiConnector``; workers are simulated.
"""

from __future__ import annotations

from typing import Any

from engine_without_worker import EngineWithoutWorker, Job
from plugin_settings import transfer_config
from simulated_offloading import LateCopies
from vllm.config import KVTransferConfig, ModelConfig
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiKVConnectorMetadata,
    MultiKVConnectorWorkerMetadata,
)
from vllm.v1.outputs import KVConnectorOutput

from kvcomm_vllm.connector import KVCommConnector

CHUNK_BYTES = 4096  # the least that vLLM takes


class EngineBeside(EngineWithoutWorker):
    """Args:
    last: ours is the last of the two parts, not the first.
    chunks: pages that the other one has room for.
    late: most steps that its copies take.
    """

    has_others = True

    def __init__(
        self,
        model: ModelConfig,
        settings: dict[str, Any],
        last: bool = False,
        chunks: int = 64,
        late: int = 3,
        seed: int = 0,
        **given: Any,
    ) -> None:
        self.last = last
        self.chunks = chunks
        super().__init__(model, settings, **given)
        self.offloading = self.parts[not last]
        scheduler = self.offloading.connector_scheduler
        self.copies = LateCopies(self.memory, scheduler, self.exact_pages, late, seed)

    @property
    def parts(self) -> list[Any]:
        return self.scheduler.connector._connectors  # type: ignore[union-attr]

    @property
    def connector(self) -> KVCommConnector:
        ours = self.parts[self.last]
        assert isinstance(ours, KVCommConnector)
        return ours

    @property
    def others_load(self) -> bool:
        jobs = self.offloading.connector_scheduler._jobs.values()
        return any(not job.is_store for job in jobs)

    def transfer_config(self, settings: dict[str, Any]) -> KVTransferConfig:
        ours = transfer_config(settings)
        parts = [
            {
                "kv_connector": ours.kv_connector,
                "kv_role": ours.kv_role,
                "kv_connector_extra_config": ours.kv_connector_extra_config,
            },
            {
                "kv_connector": "OffloadingConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"cpu_bytes_to_use": self.chunks * CHUNK_BYTES},
            },
        ]
        return KVTransferConfig(
            kv_connector="MultiConnector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"connectors": parts[::-1] if self.last else parts},
        )

    def _execute(self, job: Job) -> None:
        told = job.output.kv_connector_metadata
        assert isinstance(told, MultiKVConnectorMetadata)
        ours, theirs = told.metadata[::-1] if self.last else told.metadata
        job.output.kv_connector_metadata = ours
        self.copies.flush(theirs)  # type: ignore[arg-type]
        self.copies.start(theirs)  # type: ignore[arg-type]
        super()._execute(job)
        self.copies.queue(theirs)  # type: ignore[arg-type]

    def transfer(self, found: KVConnectorOutput | None) -> KVConnectorOutput | None:
        found = super().transfer(found)
        theirs, received = self.copies.report()
        if found is None and theirs is None:
            return None
        found = found or KVConnectorOutput()
        said = found.kv_connector_worker_meta, theirs
        found.kv_connector_worker_meta = MultiKVConnectorWorkerMetadata(
            said[::-1] if self.last else said
        )
        found.finished_recving = (found.finished_recving or set()) | received
        return found
