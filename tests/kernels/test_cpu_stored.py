# SPDX-License-Identifier: Apache-2.0
"""A CPU kernel that has been compiled is not compiled again, and nothing depends on that.

numba is imported by tests, not with them: engines of the same process have to come first.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def adder(step: int) -> Any:
    from numba import njit

    from kvcomm_vllm.kernels.cpu.threads import compile_kernel, table

    @njit
    def body(job, item):  # type: ignore[no-untyped-def]
        cells = table(job.cells, job.count, 1)
        cells[item, 0] += step

    return compile_kernel(body, _job(), "adder", step)


def _job() -> Any:
    from kvcomm_vllm.kernels.cpu.threads import job_type

    return job_type("cells", "count")


def added(kernel: Any) -> list[int]:
    from kvcomm_vllm.kernels.cpu.threads import run

    cells = np.arange(4)
    run(kernel, _job(), 4, work_bytes=0, cells=cells.ctypes.data, count=4)
    return [int(cell) for cell in cells]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    return tmp_path


def test_a_kernel_is_compiled_once() -> None:
    first, again = adder(3), adder(3)
    assert (first.cache_hits, again.cache_hits) == (0, 1)
    assert added(first) == added(again) == [3, 4, 5, 6]


def test_kernels_of_one_source_are_told_apart() -> None:
    assert [added(adder(step)) for step in (3, 5, 3, 5)] == [[3, 4, 5, 6], [5, 6, 7, 8]] * 2


def test_another_process_has_it_too(folder: Path) -> None:
    adder(3)
    script = "import test_cpu_stored as t; k = t.adder(3); print(k.cache_hits, t.added(k))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env={"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "1 [3, 4, 5, 6]", done.stderr


def test_a_changed_source_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    adder(3)
    monkeypatch.setattr("kvcomm_vllm.kernels.cpu.stored._sources", lambda: "changed")
    assert adder(3).cache_hits == 0


def test_a_broken_file_is_compiled_again(folder: Path) -> None:
    adder(3)
    (file,) = folder.rglob("*.nbc")
    file.write_bytes(file.read_bytes()[:100])
    kernel = adder(3)
    assert (kernel.cache_hits, added(kernel)) == (0, [3, 4, 5, 6])


def test_without_a_place_to_keep_it_a_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])
    assert [adder(3).cache_hits for _ in range(2)] == [0, 0]
    assert added(adder(3)) == [3, 4, 5, 6]
