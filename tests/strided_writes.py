# SPDX-License-Identifier: Apache-2.0
"""How vLLM's kernels write K and V into pages of a GPU, in torch."""

from __future__ import annotations

from typing import Any

import torch

from kvcomm_vllm.kernels import packing
from kvcomm_vllm.worker.kv_view import FP8_DTYPES


def write_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    **_: Any,
) -> None:
    """What vLLM's ``reshape_and_cache_flash`` does: caches are ``[pages, tokens, heads, dim]``;
    fp8 is stored in units of the scale, and saturates; what has a negative slot, or none, is left
    out.
    """
    fp8 = FP8_DTYPES.get(kv_cache_dtype)
    kept = (slots >= 0).nonzero().squeeze(1)
    page, token = slots[kept] // key_cache.shape[1], slots[kept] % key_cache.shape[1]
    for given, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        if fp8 is None:
            cache[page, token] = given[kept].to(cache.dtype)
        else:
            limit = packing.stored_range(fp8)
            stored = (given[kept].float() / float(scale)).clamp(-limit, limit).to(fp8)
            cache.view(torch.uint8)[page, token] = stored.view(torch.uint8)


def write_pages(
    layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """What ``do_kv_cache_update`` of vLLM's GPU backends does."""
    key_cache, value_cache = cache.transpose(1, 2).split(layer.head_size, dim=-1)
    dtype, scales = layer.kv_cache_dtype, (layer._k_scale, layer._v_scale)
    write_flash(key, value, key_cache, value_cache, slots, dtype, *scales)
