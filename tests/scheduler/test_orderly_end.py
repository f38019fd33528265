# SPDX-License-Identifier: Apache-2.0
"""An engine that is told to end writes what it has begun to write."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_without_worker import EngineWithoutWorker
from scripts import words

from kvcomm_vllm.scheduler.tiers import disk

Make = Callable[..., EngineWithoutWorker]


def test_what_slower_tiers_were_given_is_there_after_the_end(
    make_engine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = disk.store_page

    def slowly(*page: Any) -> None:
        time.sleep(0.02)
        store(*page)

    monkeypatch.setattr(disk, "store_page", slowly)
    tiers = {"host_gb": 0.0005, "disk_path": str(tmp_path)}
    engine = make_engine(tiers=tiers, audits=False, heal="off", num_blocks=64)
    for name in range(6):
        engine.serve(f"{name}", words(name, 40))
    engine.idle()
    given = len(engine.half.tiers._manager.primary_tier._policy.chunks)
    engine.half.tiers.close()
    assert len(list(tmp_path.rglob("*.bin"))) == given >= 6 * 40 // engine.block_size
