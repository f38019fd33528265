# SPDX-License-Identifier: Apache-2.0
"""Attention layers with pages as on a GPU, in this machine's memory: K and V of a token side by
side, in any order of heads and tokens, written as vLLM's kernels write them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.pages import Packing, PageGroup
from kvcomm_vllm.worker.kv_view import FP8_DTYPES, LayerGroup
from kvcomm_vllm.worker.rope import no_rope, rope_of

Write = Callable[..., None]


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
    fp8 is stored in units of the scale, and saturates.
    """
    fp8 = FP8_DTYPES.get(kv_cache_dtype)
    page, token = slots // key_cache.shape[1], slots % key_cache.shape[1]
    for given, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        if fp8 is None:
            cache[page, token] = given.to(cache.dtype)
        else:
            limit = packing.stored_range(fp8)
            stored = (given.float() / float(scale)).clamp(-limit, limit).to(fp8)
            cache.view(torch.uint8)[page, token] = stored.view(torch.uint8)


def write_pages(
    layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """What ``do_kv_cache_update`` of vLLM's GPU backends does."""
    key_cache, value_cache = cache.transpose(1, 2).split(layer.head_size, dim=-1)
    dtype, scales = layer.kv_cache_dtype, (layer._k_scale, layer._v_scale)
    write_flash(key, value, key_cache, value_cache, slots, dtype, *scales)


def layer(
    name: str,
    cache: torch.Tensor,
    kv_dtype: str,
    scales: tuple[float, float] = (1.0, 1.0),
    write: Write = write_pages,
) -> Any:
    """A layer over ``cache`` ``[pages, heads, tokens, 2 * head_size]``."""
    return SimpleNamespace(
        layer_name=name,
        kv_cache=cache,
        kv_cache_dtype=kv_dtype,
        head_size=cache.shape[-1] // 2,
        impl=SimpleNamespace(do_kv_cache_update=write),
        _k_scale=torch.tensor(scales[0]),
        _v_scale=torch.tensor(scales[1]),
    )


def group_of(layers: list[Any], rotary: Any | None = None) -> LayerGroup:
    """The layers, of one kind, as a group."""
    first = layers[0]
    fp8 = FP8_DTYPES.get(first.kv_cache_dtype)
    rope = no_rope(first.kv_cache.device) if rotary is None else rope_of(rotary)
    pages = PageGroup(
        layers=tuple(each.kv_cache.view(fp8) if fp8 else each.kv_cache for each in layers),
        packing=Packing.STRIDED,
        head_dim=first.head_size,
        rotary_dim=rope.rotary_dim,
        interleaved=rope.interleaved,
        k_scales=tuple(float(each._k_scale) for each in layers) if fp8 else None,
        v_scales=tuple(float(each._v_scale) for each in layers) if fp8 else None,
    )
    return LayerGroup(tuple(layers), pages, rope, rotary)
