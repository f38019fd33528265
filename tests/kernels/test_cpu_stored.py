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
    assert (first.stored, again.stored) == (False, True)
    assert added(first) == added(again) == [3, 4, 5, 6]


def test_kernels_of_one_source_are_told_apart() -> None:
    assert [added(adder(step)) for step in (3, 5, 3, 5)] == [[3, 4, 5, 6], [5, 6, 7, 8]] * 2


def elsewhere(folder: Path, steps: list[int]) -> str:
    """What another process prints that makes these kernels, in this order, and runs them all."""
    script = f"""
import test_cpu_stored as t
kernels = [t.adder(step) for step in {steps}]
print([kernel.stored for kernel in kernels], [t.added(kernel)[0] for kernel in kernels])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env={"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_process_has_it_too(folder: Path) -> None:
    adder(3)
    assert elsewhere(folder, [3]) == "[True] [3]"


def test_kernels_of_several_processes_do_not_mix(folder: Path) -> None:
    """The compiler numbers functions anew in every process, and tells symbols apart by that."""
    assert elsewhere(folder, [3]) == "[False] [3]"
    assert elsewhere(folder, [5]) == "[False] [5]"
    assert elsewhere(folder, [3, 7, 5]) == "[True, False, True] [3, 7, 5]"
    assert elsewhere(folder, [7, 9, 5, 3]) == "[True, False, True, True] [7, 9, 5, 3]"


def test_a_changed_source_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adder(3)
    monkeypatch.setattr("kvcomm_vllm.kernels.cpu.stored._sources", lambda: "changed")
    (older,) = folder.rglob("*.kernel")
    assert not adder(3).stored
    assert adder(3).stored
    assert list(folder.rglob("*.kernel")) != [older]
    assert not older.exists()


def broken(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    return {
        "empty": b"",
        "cut off": content[:-1],
        "one bit": content[:middle] + flipped + content[middle + 1 :],
    }


@pytest.mark.parametrize("how", ["empty", "cut off", "one bit"])
def test_a_broken_file_is_compiled_again(folder: Path, how: str) -> None:
    adder(3)
    (file,) = folder.rglob("*.kernel")
    file.write_bytes(broken(file.read_bytes())[how])
    kernel = adder(3)
    assert (kernel.stored, added(kernel)) == (False, [3, 4, 5, 6])
    assert adder(3).stored


def test_code_of_another_kernel_is_never_run(folder: Path) -> None:
    adder(3)
    (three,) = folder.rglob("*.kernel")
    adder(5)
    (five,) = set(folder.rglob("*.kernel")) - {three}
    five.write_bytes(three.read_bytes())
    kernel = adder(5)
    assert (kernel.stored, added(kernel)) == (False, [5, 6, 7, 8])


def test_without_a_place_to_keep_it_a_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])
    assert not any(adder(3).stored for _ in range(2))
    assert added(adder(3)) == [3, 4, 5, 6]
