# SPDX-License-Identifier: Apache-2.0
"""Who has waited long enough takes what the pool has, and drives nothing out of it by asking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_without_worker import EngineWithoutWorker
from scripts import words
from slower_tiers import settle

from kvcomm_vllm.compat.offload import TierRequest, in_pool, look_up

Make = Callable[..., EngineWithoutWorker]
FIRST, SECOND = words("first", 16), words("second", 16)


@pytest.fixture
def engine(make_engine: Make, tmp_path: Path) -> EngineWithoutWorker:
    # a pool of five pages
    tiers = {"host_gb": 0.00002, "disk_path": str(tmp_path), "wait_seconds": 0.0}
    engine = make_engine(tiers=tiers, audits=False, heal="off", num_blocks=26)
    (disk,) = engine.half.tiers._manager.secondary_tiers

    def at_once(key: object, request: object) -> bool:
        return Path(disk.file_mapper.get_file_name(key)).exists()

    disk._lookup_manager.lookup = at_once
    return engine


def test_what_the_pool_has_is_read_while_only_the_disk_has_the_rest(
    engine: EngineWithoutWorker,
) -> None:
    manager = engine.half.tiers._manager
    names: list[bytes] = []
    for text in [FIRST, SECOND, *(words(("other", number), 16) for number in range(12))]:
        request = engine.add(f"{text}", text)
        names += [bytes(name) for name in request.block_hashes[:4]]
        engine.run(request.request_id)
        settle(engine)
    names = names[:4]
    reader = TierRequest(manager, "reader")
    for name in names:
        look_up(manager, name, reader.context)
    settle(engine)
    assert all(in_pool(manager, name) for name in names)
    late = engine.serve("late", words("c", 24) + FIRST + words("d", 3) + SECOND + words("e", 2))
    assert late.report["reused"] == len(FIRST) - 2, "the second is computed"
