# SPDX-License-Identifier: Apache-2.0
"""A page that a tier has lost is brought back from another copy of its text, if there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_without_worker import EngineWithoutWorker
from scripts import words
from slower_tiers import settle

Make = Callable[..., EngineWithoutWorker]
SHARED = words("shared", 48)


@pytest.mark.parametrize("lost", [0, 1])
def test_text_of_which_one_copy_is_lost_is_read_from_the_other(
    make_engine: Make, tmp_path: Path, lost: int
) -> None:
    tiers = {"host_gb": 0.0002, "disk_path": str(tmp_path)}  # 51 pages
    engine = make_engine(tiers=tiers, audits=False, heal="off", num_blocks=48)
    copies: list[set[Path]] = []
    for name in ("a", "b"):
        before = set(tmp_path.rglob("*.bin"))
        engine.serve(name, words(name, 21 + len(copies)) + SHARED + words((name, "end"), 3))
        settle(engine)
        copies.append(set(tmp_path.rglob("*.bin")) - before)
    for number in range(4):
        engine.serve(f"other {number}", words(("other", number), 150))
        settle(engine)
    for path in copies[lost]:
        path.unlink()
    served = engine.serve("c", words("c", 24) + SHARED + words("d", 3))
    assert served.report["reused"] >= 44
