# SPDX-License-Identifier: Apache-2.0
"""Tiers as they were asked for, as far as they can be had: an engine serves without them."""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from kvcomm_vllm.compat.offload import disk_tier, foreign_tier, unname, valkey_tier
from kvcomm_vllm.config.secondary import name_of
from kvcomm_vllm.config.tiers import TiersConfig
from kvcomm_vllm.messages import WorkerFacts
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.scheduler.engine_state import EngineState
from kvcomm_vllm.scheduler.sources import SourceFinder
from kvcomm_vllm.scheduler.tiers.base import NoTiers, Tiers
from kvcomm_vllm.scheduler.tiers.folder import MOST_BYTES, FolderManifests, tenant_key
from kvcomm_vllm.scheduler.tiers.manifests import Manifests
from kvcomm_vllm.scheduler.tiers.pool import HostPool

logger = init_logger("vllm.kvcomm")
GIB = 2**30
MANIFESTS = 0.01  # of disk_gb is theirs
FIRST_LOOK_SECONDS = 5.0  # at what other engines have written down so far


@dataclass(frozen=True)
class Slower:
    """A tier behind the pool.

    Args:
        tier: as vLLM is told of it.
        manifests: makes those of what lies there.
        key: makes digests of tenants.
        told: where it is, for the log.
    """

    tier: dict[str, Any]
    manifests: Callable[[], Manifests]
    key: bytes
    told: str


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
    config, layout = finder.config.tiers, facts[0].layout
    slower = []
    if config.disk_path and (disk := _disk(config, spec.fingerprint(layout))):
        slower.append(disk)
    # on disk vLLM tells apart how many ranks have a part of a page
    key = slower[0].key if slower else os.urandom(32)
    shape = f"{len(facts)} x {layout}"
    if config.shared and (shared := _shared(config, spec.fingerprint(shape), key)):
        slower.append(shared)
    others = config.secondary_tiers
    foreign = [foreign_tier(one, number) for number, one in enumerate(others.plain(), 1)]
    try:
        manager = spec.manager_over([one.tier for one in slower] + foreign)
        unname(manager)
    except Exception:  # no memory for the pool, and whatever else is not as it should be
        logger.exception("kvcomm: no tiers, pages that leave the KV cache are lost")
        return NoTiers()
    manifests = [one.manifests() for one in slower]
    pool = HostPool(manager, finder, stats, engine, len(facts), manifests, bool(foreign))
    logger.info(
        "kvcomm: tiers: %.1f GiB of host memory, %d pages%s",
        spec.num_chunks * spec.kv_bytes_per_chunk / GIB,
        spec.num_chunks,
        "".join(f"; {told}" for told in (*(one.told for one in slower), *map(name_of, others))),
    )
    pool.news()
    return pool


def _disk(config: TiersConfig, fingerprint: str) -> Slower | None:
    """None where nothing can be written."""
    root = Path(config.disk_path).expanduser()
    try:
        key = tenant_key(root)
        folder = root / fingerprint
        folder.mkdir(exist_ok=True, mode=0o700)
        probe = folder / "probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        logger.error("kvcomm: tiers.disk_path: %s: nothing is kept on disk", error)
        return None
    most = int(config.disk_gb * GIB)
    told = min(int(MANIFESTS * most), MOST_BYTES)
    tier = disk_tier(str(folder), most - told)
    manifests = partial(FolderManifests, folder / "manifests-1", key, told)
    return Slower(tier, manifests, key, f"up to {config.disk_gb} GiB in {folder}")


def _shared(config: TiersConfig, fingerprint: str, key: bytes) -> Slower | None:
    """None where the server refuses us, or there is nothing that speaks with it. One that is away
    may come.
    """
    try:
        from kvcomm_vllm.scheduler.tiers.server import SharedServer
        from kvcomm_vllm.scheduler.tiers.stream import StreamManifests
    except ModuleNotFoundError as error:
        logger.error(
            "kvcomm: tiers.shared: %s; pip install 'kvcomm-vllm[shared]': no tier is shared", error
        )
        return None
    server = SharedServer(config.server)
    if (refusal := server.refusal()) is not None:
        logger.error("kvcomm: tiers.shared: %s: %s: no tier is shared", server.name, refusal)
        return None
    prefix, ttl = f"kvcomm:{fingerprint}:", config.shared_ttl_seconds

    def manifests() -> StreamManifests:
        made = StreamManifests(server, prefix, ttl, key)
        made.wait(FIRST_LOOK_SECONDS)
        return made

    return Slower(valkey_tier(server, prefix, ttl), manifests, key, f"shared at {server.name}")
