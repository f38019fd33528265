# SPDX-License-Identifier: Apache-2.0
"""Promises of the suite itself."""

from collections import Counter
from pathlib import Path


def test_all_test_files_can_be_collected_together() -> None:
    """Folders of tests are no packages, so pytest takes files of one name for the same module."""
    tests = Path(__file__).resolve().parents[1]
    names = Counter(path.name for path in tests.rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []
