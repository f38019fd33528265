# SPDX-License-Identifier: Apache-2.0
"""What each tier has had, given and dropped is counted; nothing is kept until somebody asks."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_without_worker import EngineWithoutWorker
from scripts import words
from slower_tiers import settle

from kvcomm_vllm.scheduler.tiers.room import make_room

Make = Callable[..., EngineWithoutWorker]
SHARED = words("shared", 48)


@pytest.fixture
def engine(make_engine: Make, tmp_path: Path) -> EngineWithoutWorker:
    tiers = {"host_gb": 0.0002, "disk_path": str(tmp_path)}  # 51 pages
    return make_engine(tiers=tiers, audits=False, heal="off", num_blocks=48)


def crowd_out(engine: EngineWithoutWorker) -> None:
    """The pool gives no page away that is still being written to disk: that is waited for."""
    settle(engine)
    for number in range(4):
        engine.serve(f"other {number}", words(("other", number), 150))
        settle(engine)


def test_each_tier_is_counted_by_its_name(
    engine: EngineWithoutWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: Counter[tuple[str, str]] = Counter()

    def count(metric: str, tier: str, amount: float) -> None:
        counted[metric.removeprefix("tier_"), tier] += amount

    monkeypatch.setattr(engine.half.stats, "count_tier", count)
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    crowd_out(engine)
    served = engine.serve("b", words("c", 24) + SHARED + words("d", 3))
    assert served.report["reused"] == 46
    crowd_out(engine)
    assert counted["hits", "disk"] >= 46 // engine.block_size
    assert counted["queries", "host"] >= counted["queries", "disk"]
    assert counted["written_bytes", "disk"] > counted["read_bytes", "disk"] > 0
    assert counted["read_seconds", "disk"] > 0
    assert counted["dropped", "host"] > 0


def test_nothing_that_was_counted_piles_up(engine: EngineWithoutWorker) -> None:
    crowd_out(engine)
    engine.step()
    manager = engine.half.tiers._manager
    assert not manager.primary_tier.allocation_sizes_in_current_batch
    assert manager._metrics._stats.is_empty()


def test_pages_that_had_to_go_from_the_disk_are_counted(tmp_path: Path) -> None:
    for number in range(10):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(bytes(1000))
        os.utime(path, (time.time() - number,) * 2)
    assert make_room(tmp_path, 8000) == (7000, 3)
    assert make_room(tmp_path, 8000) == (7000, 0)
