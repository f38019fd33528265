# SPDX-License-Identifier: Apache-2.0
"""Promises of the suite itself."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"


def test_no_test_file_brings_numba_along() -> None:
    """All are collected before any runs, and an engine has to start before numba is there."""
    kernels = (ROOT / "kernels/cpu").glob("*.py")
    compiled = [f.stem for f in kernels if re.search("^(from|import) numba", f.read_text(), re.M)]
    assert "threads" in compiled
    numba = rf"^(from|import) (numba|llvmlite|kvcomm_vllm.kernels.cpu.({'|'.join(compiled)}))\b"
    found = [f.name for f in TESTS.rglob("*.py") if re.search(numba, f.read_text(), re.M)]
    assert found == []


def test_all_test_files_can_be_collected_together() -> None:
    """Folders of tests are no packages, so pytest takes files of one name for the same module."""
    names = Counter(path.name for path in TESTS.rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []
