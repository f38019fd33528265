# SPDX-License-Identifier: Apache-2.0
"""Runs the tests in ``test_*_interpreted.py`` in one child process under Triton's interpreter.

Triton decides when it is imported whether kernels are compiled or interpreted, and other tests of
the same run (vLLM's own) must not be interpreted. With the variable already set, or on a machine
whose Triton has a device (set KVCOMM_KERNELS_ON_DEVICE=1), they run in place.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from child_tests import INTERPRETED_FILES, ChildTests

INTERPRETED = ChildTests(
    INTERPRETED_FILES,
    "KVCOMM_INTERPRETED_RESULTS",
    # One thread: blocks of a few kilobytes are not worth waking a pool for.
    {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    in_place=os.environ.get("TRITON_INTERPRET") == "1" or "KVCOMM_KERNELS_ON_DEVICE" in os.environ,
)
pytest_pyfunc_call = INTERPRETED.pytest_pyfunc_call
pytest_runtest_logreport = INTERPRETED.pytest_runtest_logreport


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreting and compiling takes minutes: not for the fast lane."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)
