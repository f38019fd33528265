# SPDX-License-Identifier: Apache-2.0
"""What vLLM's configuration of the KV cache says about its groups (0.28 - 0.33)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomm_vllm.kv_groups import ONE_GROUP, KVGroups

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


class UnknownGroupsError(Exception):
    """The groups are not those that are understood; says what was found."""


def kv_groups(config: VllmConfig, kv_cache: KVCacheConfig) -> KVGroups:
    """One group of full attention, and others with a window each.

    Raises:
        UnknownGroupsError: there are others, or pages of several sizes.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    specs = [group.kv_cache_spec for group in kv_cache.kv_cache_groups]
    if len(specs) <= 1:
        return ONE_GROUP
    full = [number for number, spec in enumerate(specs) if type(spec) is FullAttentionSpec]
    if len(full) != 1:
        raise UnknownGroupsError(f"{len(full)} KV cache groups of full attention")
    windows: dict[int, int] = {}
    for number, spec in enumerate(specs):
        if number in full:
            continue
        if type(spec) is not SlidingWindowSpec or getattr(spec, "extra_retained_tokens", False):
            raise UnknownGroupsError(f"a KV cache group of {type(spec).__name__}")
        windows[number] = int(spec.sliding_window)
    sizes = {int(spec.block_size) for spec in specs}
    cache = config.cache_config
    finer = getattr(cache, "prefix_match_unit", None) or cache.block_size
    if sizes != {int(cache.block_size)} or finer != cache.block_size:
        raise UnknownGroupsError(f"pages of {sorted(sizes)} tokens, hashes of {finer}")
    return KVGroups(full[0], windows)


def group_of_layers(kv_cache: KVCacheConfig) -> dict[str, int]:
    """By a layer's name the number of its group."""
    return {
        name: number
        for number, group in enumerate(kv_cache.kv_cache_groups)
        for name in group.layer_names
    }
