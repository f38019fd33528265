# SPDX-License-Identifier: Apache-2.0
"""What vLLM and the plugin do on a GPU, on a CPU: strided pages, Triton's kernels (interpreted),
asynchronous scheduling, and model runner V2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from child_tests import ChildTests

STRIDED = ChildTests(
    "test_strided.py",
    "KVCOMM_STRIDED_RESULTS",
    # model runner V1 has torch compile a line of its own, which asks Triton for its device
    {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
)

# Layout, page and runner of engines with several ranks: their workers have imported vLLM before
# anything of ours, and runner V2 needs ``install``.
OF_RANKS = ("LBNHC", 16, 1)


def install() -> None:
    """Before anything of vLLM is imported: it uses Triton on a CPU only where Triton has a backend
    for one. Interpreted kernels need none.
    """
    assert os.environ["TRITON_INTERPRET"] == "1"
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: False)
    backends.setdefault("cpu", SimpleNamespace(driver=driver))


@contextmanager
def as_on_a_gpu(layout: str, page: int, runner: int, asynchronous: bool = True) -> Iterator[None]:
    """Engines that start inside, and end inside, work as on a GPU.

    Args:
        layout: vLLM's name of the pages' layout.
        page: tokens of the pages that attention reads.
        runner: vLLM's model runner, 1 or 2.
    """
    from strided_attention import StridedBackend
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_interface import KVCacheLayout

    check = CpuPlatform.check_and_update_config

    def checked(vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asynchronous

    register_backend(AttentionBackendEnum.TRITON_ATTN, "strided_attention.StridedBackend")
    path = AttentionBackendEnum.TRITON_ATTN.get_path()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(checked))
        patch.setattr(CpuPlatform, "get_attn_backend_cls", staticmethod(lambda *_, **__: path))
        patch.setattr("kvcomm_vllm.worker.accelerator.accelerated", lambda device: True)
        patch.setattr(StridedBackend, "layouts", (KVCacheLayout[layout],))
        patch.setattr(StridedBackend, "page", page)
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(runner - 1))
        selector._cached_get_attn_backend.cache_clear()
        yield
        selector._cached_get_attn_backend.cache_clear()
