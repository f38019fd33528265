# SPDX-License-Identifier: Apache-2.0
"""Tiers as they were asked for, as far as they can be had: an engine serves without them."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from kvcomm_vllm.compat.offload import disk_tier, unname
from kvcomm_vllm.config.tiers import TiersConfig
from kvcomm_vllm.messages import WorkerFacts
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.scheduler.engine_state import EngineState
from kvcomm_vllm.scheduler.sources import SourceFinder
from kvcomm_vllm.scheduler.tiers.base import NoTiers, Tiers
from kvcomm_vllm.scheduler.tiers.manifests import Manifests, tenant_key
from kvcomm_vllm.scheduler.tiers.pool import HostPool

logger = init_logger("vllm.kvcomm")
GIB = 2**30


def open_tiers(
    spec: Any | None,
    facts: Listing[WorkerFacts],
    finder: SourceFinder,
    stats: KVCommStats,
    engine: EngineState,
) -> Tiers:
    """Args:
    spec: :class:`~kvcomm_vllm.worker.host_pool.HostPoolSpec`; None if no tier is asked for.
    facts: of all ranks; each has its part of the pool, or there is none.
    """
    if spec is None or not all(fact.pool for fact in facts):
        return NoTiers()
    config = finder.config.tiers
    folder, slower, secret = None, [], None
    if config.disk_path:
        try:
            folder, secret = _folder(config, spec.fingerprint(facts[0].layout))
            slower.append(disk_tier(str(folder), int(config.disk_gb * GIB)))
        except OSError as error:
            logger.error("kvcomm: tiers.disk_path: %s: nothing is kept on disk", error)
            folder = secret = None
    try:
        manager = spec.manager_over(slower)
        unname(manager)
    except Exception:  # no memory for the pool, and whatever else is not as it should be
        logger.exception("kvcomm: no tiers, pages that leave the KV cache are lost")
        return NoTiers()
    manifests = Manifests(folder / "manifests-1") if folder else None
    pool = HostPool(manager, finder, stats, engine, len(facts), manifests, secret)
    logger.info(
        "kvcomm: tiers: %.1f GiB of host memory, %d pages%s",
        spec.num_chunks * spec.kv_bytes_per_chunk / GIB,
        spec.num_chunks,
        f"; up to {config.disk_gb} GiB in {folder}" if folder else "",
    )
    pool.news()
    return pool


def _folder(config: TiersConfig, fingerprint: str) -> tuple[Path, bytes]:
    """Where this model's pages lie, and the key of tenants' digests.

    Raises:
        OSError: nothing can be written there.
    """
    root = Path(config.disk_path).expanduser()
    secret = tenant_key(root)
    folder = root / fingerprint
    folder.mkdir(exist_ok=True, mode=0o700)
    probe = folder / "probe"
    probe.write_bytes(b"")
    probe.unlink()
    return folder, secret
