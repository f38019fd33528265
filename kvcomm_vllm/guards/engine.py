# SPDX-License-Identifier: Apache-2.0
"""What rules reuse out and is seen in the finished engine alone: what vLLM itself has decided.

Models and arguments that never reuse are dealt with before (``model.py``, ``arguments.py``); what
only the workers see (page layout, rotary embedding) follows in ``worker/kv_view.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcomm_vllm.compat.groups import UnknownGroupsError, kv_groups
from kvcomm_vllm.compat.rules import settings_of_config
from kvcomm_vllm.guards.settings import unsupported_settings
from kvcomm_vllm.kv_groups import ONE_GROUP, KVGroups
from kvcomm_vllm.reasons import Reason

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True)
class EngineOff:
    """Reuse is off for this engine."""

    reason: Reason
    detail: str


def engine_groups(config: VllmConfig, kv_cache: KVCacheConfig, off: EngineOff | None) -> KVGroups:
    """The groups that are reused, if any are."""
    return ONE_GROUP if off is not None else kv_groups(config, kv_cache)


def engine_off(
    config: VllmConfig, kv_cache: KVCacheConfig, hybrid: bool = False
) -> EngineOff | None:
    """The first thing found that rules reuse out, or None.

    Args:
        hybrid: the connector is made for several KV cache groups.
    """
    groups = kv_cache.kv_cache_groups
    reason = unsupported_settings(settings_of_config(config))
    if reason is not None:
        return EngineOff(reason, "in vLLM's finished configuration")
    if hybrid and len(groups) > 1:
        return _hybrid_off(config, kv_cache)
    if len(groups) != 1:
        return EngineOff(Reason.SLIDING_WINDOW_HYBRID, f"{len(groups)} KV cache groups")
    spec = groups[0].kv_cache_spec
    unknown = _unknown_kinds(spec, config.speculative_config is not None)
    if unknown:
        return EngineOff(Reason.UNKNOWN_LAYOUT, ", ".join(unknown))
    if getattr(kv_cache, "hash_block_size", None) not in (None, spec.block_size):
        return EngineOff(Reason.UNKNOWN_LAYOUT, "block hashes finer than pages")
    return None


def _unknown_kinds(spec: Any, drafts: bool) -> list[str]:
    """Of the layers of a group what is not understood, by vLLM's names; layers with heads of
    several sizes are not where some may be a drafter's.
    """
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        MLAAttentionSpec,
        UniformTypeKVCacheSpecs,
    )

    # subclasses drop pages of a running request (R-SWA) or put their own before it (sinks)
    known: tuple[type, ...] = (FullAttentionSpec, MLAAttentionSpec)
    specs = [spec]
    if type(spec) is UniformTypeKVCacheSpecs and not drafts:
        known, specs = (FullAttentionSpec,), list(spec.kv_cache_specs.values())
    return sorted({type(one).__name__ for one in specs if type(one) not in known})


def _hybrid_off(config: VllmConfig, kv_cache: KVCacheConfig) -> EngineOff | None:
    events = getattr(config, "kv_events_config", None)
    listened = bool(getattr(events, "enable_kv_cache_events", False))
    if listened or config.lora_config is not None or config.speculative_config is not None:
        detail = "beside LoRA adapters, speculative decoding or KV events"
        return EngineOff(Reason.SLIDING_WINDOW_HYBRID, detail)
    try:
        kv_groups(config, kv_cache)
    except UnknownGroupsError as found:
        return EngineOff(Reason.SLIDING_WINDOW_HYBRID, str(found))
    return None
