# SPDX-License-Identifier: Apache-2.0
"""MLA on a CPU as vLLM runs it where there is AMX, and on GPUs: with prefix caching and chunked
prefill, which it switches off on other CPUs although its attention for them can do both.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from engines import IN_ONE_PROCESS, elsewhere, make_engine
from tiny_families import FAMILIES
from vllm import LLM
from vllm.platforms.cpu import CpuPlatform

V3 = FAMILIES["deepseek v3"]
PAGE = 16  # tokens, the only ones its attention takes


@contextmanager
def with_prefix_caching() -> Iterator[None]:
    """For engines that start inside, in this process."""
    check = CpuPlatform.check_and_update_config

    def checked(vllm_config: Any) -> None:
        scheduler, caching = vllm_config.scheduler_config, vllm_config.cache_config
        tokens, asked = scheduler.max_num_batched_tokens, caching.enable_prefix_caching
        check(vllm_config)
        model = vllm_config.model_config
        if model is None or not model.use_mla:
            return
        caching.enable_prefix_caching = asked
        scheduler.enable_chunked_prefill = True
        scheduler.max_num_batched_tokens = tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(checked))
        yield


@contextmanager
def plain_deepseek(folder: str) -> Iterator[LLM]:
    """Plain vLLM without prefix caching, in a process of its own: the truth."""
    with elsewhere():
        llm = make_engine(folder, enable_prefix_caching=False, **IN_ONE_PROCESS, **V3.engine)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@contextmanager
def reusing_deepseek(folder: str, plugin: dict[str, Any], **options: Any) -> Iterator[LLM]:
    """vLLM with the plugin."""
    with with_prefix_caching():
        llm = make_engine(folder, plugin=plugin, **V3.engine, **options)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
