# SPDX-License-Identifier: Apache-2.0
"""vLLM's tiers of KV (``vllm.v1.kv_offload``, 0.32): a host pool, and what lies behind it.

vLLM's own connector for them finds text by its prefix alone. What is taken from there is
everything else: the pool's memory, its bookkeeping and eviction, the copying of pages.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from kvcomm_vllm.compat.fingerprint import fingerprint
from kvcomm_vllm.wording import shown

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvcomm_vllm.config.tiers import TiersConfig
    from kvcomm_vllm.scheduler.tiers.server import SharedServer

logger = init_logger("vllm.kvcomm")


_DISK, _SHARED = "kvcomm_disk", "kvcomm_valkey"
_TIERS = {"primary": "host", _DISK: "disk", _SHARED: "shared"}
_TIERING = "vllm:kv_offload_tiering_"
_METRICS = {
    "chunk_queries": "tier_queries",
    "chunk_hits": "tier_hits",
    "read_bytes": "tier_read_bytes",
    "read_time": "tier_read_seconds",
    "write_bytes": "tier_written_bytes",
    "write_time": "tier_written_seconds",
    "promotion_job_failures": "tier_failures",
    "cascade_job_failures": "tier_failures",
    "dropped": "tier_dropped",
}


def has_tiers() -> bool:
    """Whether this vLLM has tiers as they are used here: it says where a hit comes from (0.32)."""
    try:
        needed = ("vllm.v1.kv_offload.tiering", "vllm.v1.metrics.cache_hit_source")
        return None not in map(find_spec, needed)
    except ModuleNotFoundError:  # of a package around it
        return False


def pool_spec(tiers: TiersConfig, config: VllmConfig, caches: KVCacheConfig) -> Any | None:
    """vLLM's ``TieringOffloadingSpec``, of which scheduler and workers make their halves; None
    where no pool is asked for, or vLLM has none.
    """
    if not tiers.wanted:
        return None
    if not has_tiers():
        logger.warning("kvcomm: tiers need vLLM 0.32: pages that leave the KV cache are lost")
        return None
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (
        build_offloading_config,
    )

    from kvcomm_vllm.worker.host_pool import HostPoolSpec

    settings = {"cpu_bytes_to_use": int(tiers.host_gb * 2**30), "secondary_tiers": []}
    described = build_offloading_config(config, caches)
    spec = HostPoolSpec(replace(described, extra_config=settings))
    spec.fingerprint = partial(fingerprint, config)
    return spec


def disk_tier(folder: str, max_bytes: int) -> dict[str, Any]:
    """Our file tier, as vLLM's specs are told of one."""
    name = _registered(_DISK, "kvcomm_vllm.scheduler.tiers.disk", "DiskTier")
    return {"type": name, "root_dir": folder, "max_bytes": max_bytes}


def valkey_tier(server: SharedServer, prefix: str, ttl_seconds: int) -> dict[str, Any]:
    """The same of our tier on a server, where pages' names begin with ``prefix``."""
    name = _registered(_SHARED, "kvcomm_vllm.scheduler.tiers.valkey", "ValkeyTier")
    return {"type": name, "server": server, "prefix": prefix, "ttl_seconds": ttl_seconds}


def foreign_tier(tier: dict[str, Any], number: int) -> dict[str, Any]:
    """The same of one of ``tiers.secondary_tiers``."""
    name = _registered("kvcomm_foreign", "kvcomm_vllm.scheduler.tiers.foreign", "ForeignTier")
    return {"type": name, "tier": tier, "number": number}


def unknown_tiers(tiers: TiersConfig) -> Iterator[str]:
    """Which of ``tiers.secondary_tiers`` vLLM does not know, a line each."""
    if not tiers.secondary_tiers or not has_tiers():
        return
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    known = SecondaryTierFactory._registry
    for tier in tiers.secondary_tiers:
        if tier["type"] not in known and tier.get("module_path") is None:
            yield (
                f"tiers.secondary_tiers: type {shown(tier['type'])} is not known; "
                f"allowed: one of {', '.join(known)}, or any with a module_path"
            )


def _registered(name: str, module: str, tier: str) -> str:
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    if name not in SecondaryTierFactory._registry:
        SecondaryTierFactory.register_tier(name, module, tier)
    return name


def offloading_worker(
    spec: Any, config: VllmConfig, caches: KVCacheConfig, tensors: dict[str, torch.Tensor]
) -> Any:
    """What copies pages on this rank, made for the KV cache as vLLM has laid it out."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import (
        OffloadingConnectorWorker,
    )

    connector = OffloadingConnectorWorker(spec, config, caches)
    connector.register_kv_caches(tensors)
    return connector.worker


def pages_and_chunks(pages: list[int], chunks: list[int]) -> tuple[Any, Any]:
    """The same as vLLM's workers are told."""
    from vllm.v1.kv_offload.base import GPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

    there = GPULoadStoreSpec(pages, group_sizes=(len(pages),), block_indices=(0,))
    return there, CPULoadStoreSpec(chunks)


def unname(manager: Any) -> None:
    """Take the name of the pool's memory away, once every process has it: so it goes with the last
    of them, however that ends. vLLM would leave it in ``/dev/shm`` if they were killed.
    """
    Path(manager.primary_tier._mmap_region.mmap_path).unlink(missing_ok=True)


def close_worker(worker: Any) -> None:
    """Let what copies pages end, without a word about a name that is gone."""
    region = getattr(worker, "_mmap_region", None)
    if region is not None and not Path(region.mmap_path).exists():
        region._creator = False
    worker.shutdown()


class Found(enum.Enum):
    """What a tier says of a page."""

    HERE = enum.auto()  # in the pool
    COMING = enum.auto()  # on its way there, or being looked for
    NOWHERE = enum.auto()


def key_of(name: bytes) -> Any:
    """What vLLM's tiers call the page of this name."""
    from vllm.v1.kv_offload.base import make_offload_key

    return make_offload_key(name, 0)


def name_of(key: Any) -> bytes:
    """The page's name, of what vLLM's tiers call it."""
    from vllm.v1.kv_offload.base import get_offload_block_hash

    name: bytes = get_offload_block_hash(key)
    return name


def medium_of(event: Any) -> str:
    """What KV events call the kind of memory that a tier's event is about."""
    from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE
    from vllm.v1.kv_offload.base import Medium

    names = {Medium.CPU: MEDIUM_CPU, Medium.STORAGE: MEDIUM_STORAGE}
    return str(names[event.medium])


def look_up(manager: Any, name: bytes, context: Any) -> Found:
    """Where a page lies. What lies in a slower tier begins to come to the pool by that."""
    from vllm.v1.kv_offload.base import LookupResult

    found = manager.lookup(key_of(name), context)
    if found is LookupResult.HIT:
        return Found.HERE
    return Found.NOWHERE if found is LookupResult.MISS else Found.COMING


def in_pool(manager: Any, name: bytes) -> bool:
    """Whether a page lies in the pool; nothing is begun by asking."""
    chunk = manager.primary_tier._policy.get(key_of(name))
    return chunk is not None and bool(chunk.is_ready)


def end_of_step(manager: Any) -> None:
    """Let tiers go on with what they have been asked for in this step."""
    from vllm.v1.kv_offload.base import ScheduleEndContext

    manager.on_schedule_end(ScheduleEndContext(new_req_ids=(), preempted_req_ids=()))


def let_finish(manager: Any, seconds: float) -> None:
    """Wait until slower tiers have what they were given, so long at most."""
    end = time.monotonic() + seconds
    end_of_step(manager)
    while manager._jobs and time.monotonic() < end:
        time.sleep(0.01)
        end_of_step(manager)


def take_counts(manager: Any) -> Iterator[tuple[str, str, float]]:
    """What each tier has counted since the last call: metric, tier, amount. vLLM keeps each
    observation until it is asked.
    """
    stats = manager.get_stats()
    for name, values in (stats.data["data"] if stats else {}).items():
        metric = _METRICS.get(name.removeprefix(_TIERING))
        if metric is not None:
            for (label,), amount in values.items():
                tier = label.partition(":")[2]  # vLLM's is "1:kvcomm_disk"
                yield metric, _TIERS.get(tier, tier), amount


def dropped_pages(tier_type: str, pages: int) -> Any:
    """A tier's own stats, as vLLM asks for them."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
        OffloadingConnectorStats,
    )

    stats = OffloadingConnectorStats()
    if pages:
        stats.increase_counter(_TIERING + "dropped", pages, (f":{tier_type}",))
    return stats


def drop_slower(manager: Any) -> None:
    """Neither read nor write any tier but the pool any more; nothing may be on its way."""
    tiers, manager.secondary_tiers = manager.secondary_tiers, []
    for tier in tiers:
        tier.shutdown()


class TierRequest:
    """Whom a manager takes to be asking: it wants to know of each request's begin and end."""

    def __init__(self, manager: Any, name: str) -> None:
        from vllm.v1.kv_offload.base import ReqContext

        self._manager = manager
        self.context = ReqContext(name)
        manager.on_new_request(self.context)

    def end(self) -> None:
        self._manager.on_request_finished(self.context)
