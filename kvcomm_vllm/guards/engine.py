# SPDX-License-Identifier: Apache-2.0
"""What the scheduler can see at start that makes reuse impossible for the whole engine.

Models that vLLM would not even start with a connector are dealt with before, in ``model_guard.py``;
what only the workers see (page layout, rotary embedding) follows in ``worker/kv_view.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcomm_vllm.reasons import Reason

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True)
class EngineOff:
    """Reuse is off for this engine."""

    reason: Reason
    detail: str


def engine_off(config: VllmConfig, kv_cache: KVCacheConfig) -> EngineOff | None:
    """The first thing found that rules reuse out, or None."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    parallel = config.parallel_config
    groups = kv_cache.kv_cache_groups
    if not config.cache_config.enable_prefix_caching:
        return EngineOff(Reason.PREFIX_CACHING_OFF, "--no-enable-prefix-caching")
    if parallel.pipeline_parallel_size > 1:
        return EngineOff(Reason.PIPELINE_PARALLEL, f"{parallel.pipeline_parallel_size} stages")
    if getattr(parallel, "decode_context_parallel_size", 1) > 1:
        return EngineOff(Reason.CONTEXT_PARALLEL, "--decode-context-parallel-size")
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return EngineOff(Reason.CONTEXT_PARALLEL, "--prefill-context-parallel-size")
    if parallel.data_parallel_size > 1 and getattr(config.model_config, "is_moe", True):
        return EngineOff(Reason.EXPERTS_DATA_PARALLEL, f"{parallel.data_parallel_size} ranks")
    if config.lora_config is not None:
        return EngineOff(Reason.LORA_ENABLED, "--enable-lora")
    if config.speculative_config is not None:
        return EngineOff(Reason.SPEC_DECODE, str(config.speculative_config.method))
    if len(groups) != 1:
        return EngineOff(Reason.SLIDING_WINDOW_HYBRID, f"{len(groups)} KV cache groups")
    spec = groups[0].kv_cache_spec
    if isinstance(spec, MLAAttentionSpec):
        return EngineOff(Reason.MLA, type(spec).__name__)
    # subclasses drop pages of a running request (R-SWA) or put their own before it (sinks)
    if type(spec) is not FullAttentionSpec:
        return EngineOff(Reason.UNKNOWN_LAYOUT, type(spec).__name__)
    if getattr(kv_cache, "hash_block_size", None) not in (None, spec.block_size):
        return EngineOff(Reason.UNKNOWN_LAYOUT, "block hashes finer than pages")
    return None
