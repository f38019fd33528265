# SPDX-License-Identifier: Apache-2.0
"""Plain reading and writing of token slots in every packing (vLLM 0.32 ``cpu_attn`` and CUDA)."""

from __future__ import annotations

import torch

from kvcomm_vllm.kernels.pages import ROWS, Packing, PageGroup


def stored_range(dtype: torch.dtype) -> float | None:
    """Largest finite value of an fp8 dtype, to which stores saturate; None for wider dtypes."""
    return float(torch.finfo(dtype).max) if dtype.itemsize == 1 else None


def views(group: PageGroup, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one layer as views ``[pages, heads, ...]`` in their packing's shape."""
    cache, dim = group.layers[layer], group.head_dim
    pages, heads, tokens = cache.shape[:3]
    if group.packing in ROWS:
        return (
            cache[..., group.key_at : group.key_at + dim],
            cache[..., group.value_at : group.value_at + group.value_dim],
        )
    flat = cache.view(pages, heads, 2 * tokens * dim)
    key, value = flat[..., : tokens * dim], flat[..., tokens * dim :]
    if group.packing is Packing.VEC:
        return key.unflatten(-1, (dim, tokens)), value.unflatten(-1, (tokens, dim))
    return (
        key.unflatten(-1, (tokens // 16, dim // 2, 16, 2)),
        value.unflatten(-1, (dim // 16, tokens // 2, 16, 2)),
    )


def _raw(view: torch.Tensor) -> torch.Tensor:
    # torch cannot index fp8 tensors on the CPU, bytes it can.
    return view.view(torch.uint8) if view.dtype.itemsize == 1 else view


def _scales(group: PageGroup, layer: int) -> tuple[float, float]:
    return (
        group.k_scales[layer] if group.k_scales else 1.0,
        group.v_scales[layer] if group.v_scales else 1.0,
    )


def read(group: PageGroup, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V at the slots (all >= 0), dequantised: fp32 ``[tokens, heads, head_dim]``, V with
    ``value_dim``.
    """
    key, value = (_raw(view) for view in views(group, layer))
    page, token = slots // group.tokens_per_page, slots % group.tokens_per_page
    if group.packing in ROWS:
        k, v = key[page, :, token], value[page, :, token]
    elif group.packing is Packing.VEC:
        k, v = key[page, :, :, token], value[page, :, token]
    else:
        k = key[page, :, token // 16, :, token % 16].flatten(-2)
        v = value[page, :, :, token // 2, :, token % 2].flatten(-2)
    dtype = group.layers[layer].dtype
    k_scale, v_scale = _scales(group, layer)
    return (
        k.contiguous().view(dtype).float() * k_scale,
        v.contiguous().view(dtype).float() * v_scale,
    )


def write(
    group: PageGroup, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """The inverse of :func:`read`: rounds once to the cache dtype, fp8 saturates."""
    key, value = (_raw(view) for view in views(group, layer))
    page, token = slots // group.tokens_per_page, slots % group.tokens_per_page
    dtype = group.layers[layer].dtype
    limit = stored_range(dtype)
    k_scale, v_scale = _scales(group, layer)
    k, v = k / k_scale, v / v_scale
    if limit is not None:
        k, v = k.clamp(-limit, limit), v.clamp(-limit, limit)
    k, v = _raw(k.to(dtype)), _raw(v.to(dtype))
    if group.packing in ROWS:
        key[page, :, token], value[page, :, token] = k, v
    elif group.packing is Packing.VEC:
        key[page, :, :, token], value[page, :, token] = k, v
    else:
        key[page, :, token // 16, :, token % 16] = k.unflatten(-1, (-1, 2))
        value[page, :, :, token // 2, :, token % 2] = v.unflatten(-1, (-1, 16))


def clear(group: PageGroup, layer: int, slots: torch.Tensor) -> None:
    """Writes zeros to the slots (all >= 0)."""
    empty = torch.zeros(len(slots), group.kv_heads, group.row_dim, device=slots.device)
    write(group, layer, slots, *group.split(empty))
