# SPDX-License-Identifier: Apache-2.0
"""How much KV a request of an engine holds beside what it would hold in plain vLLM."""

from __future__ import annotations

import copy
from typing import Any

from engines import core
from vllm import LLM

try:  # vLLM 0.33
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:
    from vllm.v1.core import kv_cache_utils as planning  # type: ignore[no-redef]
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

MEMORY = 1 << 30  # bytes that are shared out


def kv_held_against_plain(llm: LLM) -> float:
    """Bytes of KV of a request as long as the model allows, divided by plain vLLM's, both as vLLM
    itself reckons them for the layers of this engine.
    """
    engine = core(llm)
    specs = engine.model_executor.get_kv_cache_specs()
    ours = engine.scheduler.kv_cache_config
    requests = _requests(_config(engine, plain=False), specs)
    groups, room = requests
    assert groups == len(ours.kv_cache_groups), "this is not how the engine's own was made"
    _, plain = _requests(_config(engine, plain=True), specs)
    return round(plain / room, 2)


def plain_pages(llm: LLM) -> int:
    """Pages that plain vLLM would make of the memory this engine has for KV."""
    engine = core(llm)
    specs = engine.model_executor.get_kv_cache_specs()
    memory = [engine.available_gpu_memory_for_kv_cache]
    plain = _config(engine, plain=True)
    return int(planning.get_kv_cache_configs(plain, specs, memory)[0].num_blocks)


def _requests(config: Any, specs: list[Any]) -> tuple[int, float]:
    """Groups of layers, and requests that fit into MEMORY."""
    made = planning.get_kv_cache_configs(config, specs, [MEMORY] * len(specs))[0]
    return len(made.kv_cache_groups), get_max_concurrency_for_kv_cache_config(config, made)


def _config(engine: Any, plain: bool) -> Any:
    """Of the same engine, or without a connector; of a request that is decoding, so that windows
    are not wider by what one step computes.
    """
    config = copy.copy(engine.vllm_config)
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.cache_config = copy.copy(config.cache_config)
    config.scheduler_config.max_num_batched_tokens = config.cache_config.block_size
    if plain:
        config.kv_transfer_config = None
        config.scheduler_config.disable_hybrid_kv_cache_manager = False
    return config
