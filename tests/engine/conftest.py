# SPDX-License-Identifier: Apache-2.0
"""Engines shared by the tests of a module; one engine at a time lives in this process.

The tests in ``test_strided.py`` run in one child process, where vLLM has Triton on a CPU.
"""

import gc
import os
from collections.abc import Iterator

import pytest
from strided_platform import STRIDED, install

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
if STRIDED.name in os.environ:
    install()

from engines import IN_ONE_PROCESS, elsewhere, make_engine
from tiny_families import FAMILIES, save_family
from vllm import LLM

pytest_runtest_setup = STRIDED.pytest_runtest_setup
pytest_pyfunc_call = STRIDED.pytest_pyfunc_call
pytest_runtest_logreport = STRIDED.pytest_runtest_logreport


@pytest.fixture(scope="session")
def plain(tiny_llama: str) -> Iterator[LLM]:
    """Plain vLLM without prefix caching: the truth. In a process of its own, as vLLM's connector is
    global; it keeps nothing of one test for the next, and so serves those of all files.
    """
    with elsewhere():
        llm = make_engine(tiny_llama, enable_prefix_caching=False, **IN_ONE_PROCESS)
    yield from _running(llm)


@pytest.fixture(scope="module")
def reusing(tiny_llama: str) -> Iterator[LLM]:
    """vLLM with the plugin as it is by default."""
    yield from _running(make_engine(tiny_llama, plugin={}))


@pytest.fixture(scope="session")
def tiny_deepseek(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random DeepSeek V3 of 3 layers, two of them with experts."""
    folder = tmp_path_factory.mktemp("tiny-deepseek")
    save_family(FAMILIES["deepseek v3"], folder)
    return str(folder)


def _running(llm: LLM) -> Iterator[LLM]:
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
