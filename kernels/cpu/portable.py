# SPDX-License-Identifier: Apache-2.0
"""Moving KV with torch operators alone: every packing and dtype, any device, nothing to compile.

The fallback where no compiled kernel serves. Against the readable reference it leaves out what is
not needed: V and the channels that are not rotated move as stored bits, only the pairs visit fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.contract import check_group, check_rotation, check_slots
from kvcomm_vllm.kernels.pages import ROWS, Packing, PageGroup, Rotation

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def load(
    group: PageGroup, src_slots: torch.Tensor, dst_slots: torch.Tensor, turn: Rotation
) -> None:
    """``K[dst] = turn * K[src]``, ``V[dst] = V[src]`` in all layers; see ``reference.load``.

    The scale of an fp8 cache is the same on both sides, so it cancels.
    """
    check_group(group)
    check_slots(group, src_slots, dst_slots)
    check_rotation(group, turn, len(src_slots))
    keep = (src_slots >= 0) & (dst_slots >= 0)
    if not bool(keep.all()):
        src_slots, dst_slots = src_slots[keep], dst_slots[keep]
        turn = Rotation(turn.cos[keep], turn.sin[keep])
    src_key, src_value = _places(group, src_slots)
    dst_key, dst_value = _places(group, dst_slots)
    bits = _BITS[group.layers[0].itemsize]
    for layer in range(len(group.layers)):
        key, value = (view.view(bits) for view in packing.views(group, layer))
        key[dst_key] = _turn(group, key[src_key], turn)
        value[dst_value] = value[src_value]


def _places(group: PageGroup, slots: torch.Tensor) -> tuple[Any, Any]:
    """Index of the slots into the K and the V view of ``packing.views``; tokens come first."""
    page, token = slots // group.tokens_per_page, slots % group.tokens_per_page
    every = slice(None)
    if group.packing in ROWS:
        return (page, every, token), (page, every, token)
    if group.packing is Packing.VEC:
        return (page, every, every, token), (page, every, token)
    return (
        (page, every, token // 16, every, token % 16),
        (page, every, every, token // 2, every, token % 2),
    )


def _turn(group: PageGroup, stored: torch.Tensor, turn: Rotation) -> torch.Tensor:
    """Turns gathered bits of K ``[tokens, heads, ...]`` in place; shape and bits as they came."""
    dtype, pairs = group.layers[0].dtype, group.rotary_dim // 2
    limit = packing.stored_range(dtype)
    flat = stored.view(len(stored), group.kv_heads, group.head_dim)
    if group.interleaved:
        a, b = flat[..., : 2 * pairs : 2], flat[..., 1 : 2 * pairs : 2]
    else:
        a, b = flat[..., :pairs], flat[..., pairs : 2 * pairs]
    x, y = (part.contiguous().view(dtype).float() for part in (a, b))
    cos, sin = turn.cos[:, None], turn.sin[:, None]
    for target, new in ((a, (x * cos).addcmul_(y, sin, value=-1)), (b, (y * cos).addcmul_(x, sin))):
        if limit is not None:
            new.clamp_(-limit, limit)
        target.copy_(new.to(dtype).view(stored.dtype))
    return stored
