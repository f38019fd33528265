# SPDX-License-Identifier: Apache-2.0
"""Runs the tests in ``test_*_mocked_cuda.py`` in one child process where vLLM takes this machine
for one with a GPU: modules bind vLLM's platform when they are imported.
"""

from __future__ import annotations

import os

import pytest
from child_tests import MOCKED_FILES, ChildTests

MOCKED = ChildTests(
    MOCKED_FILES,
    "KVCOMM_MOCKED_CUDA_RESULTS",
    {"VLLM_HAS_FLASHINFER_CUBIN": "1"},  # do not look for FlashInfer's kernels in the network
)
pytest_runtest_setup = MOCKED.pytest_runtest_setup
pytest_pyfunc_call = MOCKED.pytest_pyfunc_call
pytest_runtest_logreport = MOCKED.pytest_runtest_logreport


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The child imports vLLM once more, and its backends: not for the fast lane."""
    for item in items:
        if MOCKED.chosen(item):
            item.add_marker(pytest.mark.slow)


if MOCKED.name in os.environ:
    import mocked_cuda

    mocked_cuda.install()
