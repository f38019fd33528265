# SPDX-License-Identifier: Apache-2.0
"""The connector vLLM sees: a facade that hands each call to the half it is for.

The data path, top down: ``scheduler/half.py`` plans a request (``sources`` -> ``index`` ->
``pages`` -> ``cover`` -> ``modes`` -> ``planner`` -> ``taint`` -> ``operations``) and sends a
``messages.StepMessage`` with the step; ``worker/half.py`` carries it out before vLLM's forward
(``load`` -> ``corrections`` -> ``side_forward``).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger

from kvcomm_vllm.compat.beside import (
    Alone,
    Neighbours,
    makers,
    part_of_report,
    share_handshakes,
)
from kvcomm_vllm.compat.groups import group_of_layers
from kvcomm_vllm.compat.offload import offloading_worker, pool_spec
from kvcomm_vllm.compat.owners import find_engine, find_scheduler, find_wake_up
from kvcomm_vllm.compat.scheduler import (
    add_reports,
    data_parallel_rank,
    hear_before_outputs,
    let_go_before_resets,
    recovers_failed_loads,
    require_load_before_forward,
    uncount_hits,
    unname_what_is_not_computed,
)
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.guards.engine import engine_groups, engine_off
from kvcomm_vllm.kv_groups import memory_line
from kvcomm_vllm.messages import StepMessage, StepReport, WorkerFacts
from kvcomm_vllm.metrics import KVCommPromMetrics, KVCommStats
from kvcomm_vllm.reasons import Reason

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvcomm_vllm.scheduler.half import SchedulerHalf
    from kvcomm_vllm.worker.half import WorkerHalf

logger = init_logger("vllm.kvcomm")

SHARING = (
    "requests without cache_salt share text with each other, and can find out what others have "
    "sent: give each tenant a cache_salt of its own (docs/security.md)"
)


class KVCommConnector(KVConnectorBase_V1):
    """Reuses KV across agents; see ``configs/kvcomm.yaml`` for its settings."""

    _scheduler: SchedulerHalf
    _worker: WorkerHalf

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config or {}
        self.config = KVCommConfig.from_mapping(extra, "kv_connector_extra_config")
        parents = makers(self)
        self._neighbours = Neighbours(parents, self) if parents else Alone()
        share_handshakes(parents, self)
        block_size = vllm_config.cache_config.block_size
        spec = None  # of pages of several kinds there are no tiers
        if len(kv_cache_config.kv_cache_groups) <= 1:
            spec = pool_spec(self.config.tiers, vllm_config, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            from kvcomm_vllm.scheduler.engine_state import EngineState
            from kvcomm_vllm.scheduler.half import SchedulerHalf
            from kvcomm_vllm.scheduler.trace import open_trace

            hybrid = isinstance(self, SupportsHMA) and not parents
            self._off = engine_off(vllm_config, kv_cache_config, hybrid)
            groups = engine_groups(vllm_config, kv_cache_config, self._off)
            self._groups = groups
            if not recovers_failed_loads(vllm_config):
                # For what workers could not repair either: an error is better than a wrong answer.
                # Read when this returns.
                for maker in (self, *parents):
                    maker._kv_transfer_config.kv_load_failure_policy = "fail"
            budget = vllm_config.scheduler_config.max_num_batched_tokens
            # until workers report
            off = self._off.reason if self._off else Reason.DISABLED_AT_START
            self._vllm_scheduler = find_scheduler()
            engine = EngineState(self._vllm_scheduler, find_engine())
            self._scheduler = SchedulerHalf(
                self.config,
                block_size,
                budget,
                off,
                engine,
                find_wake_up(),
                spec,
                groups,
            )
            trace = open_trace(
                self.config.trace, data_parallel_rank(vllm_config), self._scheduler.stats
            )
            self._scheduler.reports.trace = trace
            if self._vllm_scheduler is not None:
                unname_what_is_not_computed(self._vllm_scheduler)
                let_go_before_resets(self._vllm_scheduler, self._scheduler.let_go)
                hear_before_outputs(self._vllm_scheduler, self._hear)
                if self.config.report != "off":
                    add_reports(self._vllm_scheduler, self._scheduler.tell)
            logger.info("kvcomm: %s", self.config.describe())
            if self.config.default_on and self.config.mode != "off":
                logger.warning("kvcomm: %s", SHARING)
        else:
            from kvcomm_vllm.worker.half import WorkerHalf

            make = spec and partial(offloading_worker, spec, vllm_config, kv_cache_config)
            numbers = group_of_layers(kv_cache_config)
            self._worker = WorkerHalf(self.config, vllm_config, block_size, make, numbers)

    # ---- scheduler ------------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a best-effort cache: losing a load only costs time

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._scheduler.bind_pool(gpu_block_pool)

    def set_xfer_handshake_metadata(self, metadata: Any) -> None:
        """What the workers found out at start, once; any rank that cannot reuse turns it off."""
        facts = [fact for fact in metadata.values() if isinstance(fact, WorkerFacts)]
        lame = [fact for fact in facts if fact.reason is not None]
        if self._off is not None:
            self._turn_off(self._off.reason, self._off.detail)
        elif (problem := self._neighbours.problem()) is not None:
            self._turn_off(Reason.OTHER_CONNECTOR, problem)
        elif not facts:
            self._turn_off(Reason.UNKNOWN_BACKEND, "no worker answered")
        elif any(fact.engine not in ("", self._kv_transfer_config.engine_id) for fact in facts):
            self._turn_off(Reason.FOREIGN_WORKER, "vLLM keeps one connector per process")
        elif lame:
            self._turn_off(Reason.of(str(lame[0].reason)), lame[0].detail)
        else:
            self._scheduler.workers_ready(facts)
            self._scheduler.neighbours = self._neighbours
            turns = self._scheduler.turns
            self._neighbours.join(turns.begin, turns.supplied)
            tightest = min(facts, key=lambda fact: sum(fact.rooms.values()))
            logger.info(
                "kvcomm: reuse is ON, mode %s, self-check %s%s: %s",
                self.config.mode,
                "passed" if self.config.self_check else "skipped",
                self._neighbours.said,
                tightest.summary,
            )
            longest = self._vllm_config.model_config.max_model_len
            size, hybrid = self._scheduler.block_size, bool(self._groups.windows)
            line = memory_line(tightest.windows, longest, size, hybrid)
            if line is not None:
                logger.info("kvcomm: %s", line)

    def _turn_off(self, reason: Reason, detail: str) -> None:
        self._scheduler.off = reason
        logger.warning(
            "kvcomm: reuse is OFF, requests are served exactly: %s (%s)", reason.value, detail
        )

    def on_new_request(self, request: Request) -> None:
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._neighbours.supplies(request):
            self._scheduler.turns.stand_back(request, num_computed_tokens)
            return 0, False
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        block_ids, windowed = self._by_group(blocks.get_block_ids())
        self._scheduler.admit(request, block_ids, num_external_tokens, windowed)

    def _by_group(self, tables: tuple[list[int], ...]) -> tuple[list[int], dict[int, list[int]]]:
        """The pages that hold all of a text, and those of windowed groups."""
        return tables[self._groups.full], {group: tables[group] for group in self._groups.windows}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        message = self._scheduler.build_message(scheduler_output)
        computed = self._scheduler.computed_hits
        computed.tokens = uncount_hits(self._vllm_scheduler, computed.tokens)
        if not message.empty:
            require_load_before_forward(scheduler_output)
        return message

    def has_pending_push_work(self) -> bool:
        """Keeps vLLM's loop going while it has no request but there is something to learn."""
        return self._scheduler.has_idle_work

    def _hear(self, said: object) -> None:
        report = part_of_report(said, StepReport)
        if report is not None:
            self._scheduler.hear_losses(report)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = part_of_report(connector_output.kv_connector_worker_meta, StepReport)
        lost = connector_output.invalid_block_ids
        if report is not None or lost:  # others lose pages, too
            self._scheduler.on_report(report or StepReport(), lost)

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self._scheduler.tiers.events()

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.finish(request, block_ids)

    def reset_cache(self) -> bool:
        if self.role is KVConnectorRole.SCHEDULER:
            self._scheduler.reset()
        return True

    # ---- worker ---------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> WorkerFacts:
        facts = self._worker.facts
        facts.engine = str(self._kv_transfer_config.engine_id)
        return facts

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        message = self._get_connector_metadata()
        assert isinstance(message, StepMessage)
        self._worker.run(message)

    def build_connector_worker_meta(self) -> StepReport | None:
        return self._worker.take_report()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """vLLM's word for what was loaded asynchronously: (sent, received)."""
        return None, self._worker.take_arrived()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_lost_blocks()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: all loads precede the forward, so CUDA graphs stay whole."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing to save: KV is read later, in place, from vLLM's own pages."""

    def wait_for_save(self) -> None:
        """Nothing was saved."""

    # ---- both -----------------------------------------------------------------------------------

    def shutdown(self) -> None:
        if self.role is KVConnectorRole.SCHEDULER:
            self._scheduler.tiers.close()
            self._scheduler.reports.trace.close()
        else:
            self._worker.close()

    def get_kv_connector_stats(self) -> KVCommStats | None:
        half = self._scheduler if self.role is KVConnectorRole.SCHEDULER else self._worker
        return half.stats.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVCommStats:
        return KVCommStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> KVCommPromMetrics:
        return KVCommPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


class HybridKVCommConnector(KVCommConnector, SupportsHMA):
    """The same beside vLLM's hybrid KV cache manager, which it leaves on (``hybrid_kv_cache``)."""

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.finish(request, *self._by_group(block_ids))
