# SPDX-License-Identifier: Apache-2.0
"""Collect: true KV minus base KV in the unrotated frame, straight into an anchor arena."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcomm_vllm.kernels import blocks
from kvcomm_vllm.kernels.contract import check_arena, check_rotation, check_slots, require
from kvcomm_vllm.kernels.launch import (
    cdiv,
    group_arguments,
    layers_per_program,
    tokens_per_block,
)
from kvcomm_vllm.kernels.pages import PageGroup, Rotation


@triton.jit
def collect_kernel(
    p_layers,
    p_slots,
    p_cos,
    p_sin,
    p_k_scales,
    p_v_scales,
    p_base_k,
    p_base_v,
    p_out_k,
    p_out_v,
    T,
    L,
    SKIP,
    stride_page,
    stride_head,
    stride_token,
    stride_b_row,
    stride_b_layer,
    stride_b_head,
    stride_o_row,
    stride_o_layer,
    stride_o_head,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_P: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST: tl.constexpr,
    REST_P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ELEMENT: tl.constexpr,
    FP8: tl.constexpr,
    BASE: tl.constexpr,
    BT: tl.constexpr,
    BL: tl.constexpr,
):
    """Program (i_t, i_l): BT tokens, all heads of BL layers from layer SKIP on."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    b_slot = tl.load(p_slots + o_t, mask=o_t < T, other=-1)
    m = b_slot >= 0
    o_slot = blocks.slot_offsets(b_slot, PAGE, stride_page, stride_token)
    if HALF > 0:
        b_cos, b_sin = blocks.load_factors(p_cos, p_sin, o_t, m, HALF, HALF_P)
    for i in range(BL * H):
        i_l = tl.program_id(1) * BL + i // H + SKIP
        i_d = tl.cast(i_l - SKIP, tl.int64)
        i_h = tl.cast(i % H, tl.int64)
        if i_l < L:
            p_from = blocks.layer_pointer(p_layers, i_l, ELEMENT) + o_slot + i_h * stride_head
            b_a, b_b, b_c = blocks.load_key(p_from, m, HALF, HALF_P, REST, REST_P, INTERLEAVED)
            b_v = blocks.load_row(p_from, m, D, D, D_P)
            b_ks = tl.load(p_k_scales + i_l)
            b_a = blocks.decode(b_a, FP8) * b_ks
            b_b = blocks.decode(b_b, FP8) * b_ks
            b_c = blocks.decode(b_c, FP8) * b_ks
            b_v = blocks.decode(b_v, FP8) * tl.load(p_v_scales + i_l)
            if HALF > 0:
                b_a, b_b = blocks.turn(b_a, b_b, b_cos, b_sin)
            o_row = o_t.to(tl.int64)
            if BASE:
                o_b = o_row * stride_b_row + i_d * stride_b_layer + i_h * stride_b_head
                b_da, b_db, b_dc = blocks.load_key(
                    p_base_k + o_b, m, HALF, HALF_P, REST, REST_P, INTERLEAVED
                )
                b_a -= b_da.to(tl.float32)
                b_b -= b_db.to(tl.float32)
                b_c -= b_dc.to(tl.float32)
                b_v -= blocks.load_row(p_base_v + o_b, m, 0, D, D_P).to(tl.float32)
            o_o = o_row * stride_o_row + i_d * stride_o_layer + i_h * stride_o_head
            OUT: tl.constexpr = p_out_k.dtype.element_ty
            blocks.store_key(
                p_out_k + o_o,
                b_a.to(OUT),
                b_b.to(OUT),
                b_c.to(OUT),
                m,
                HALF,
                HALF_P,
                REST,
                REST_P,
                INTERLEAVED,
            )
            blocks.store_row(p_out_v + o_o, b_v.to(OUT), m, 0, D, D_P)


def collect(
    group: PageGroup,
    slots: torch.Tensor,
    undo: Rotation,
    base_k: torch.Tensor | None,
    base_v: torch.Tensor | None,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
    *,
    skip_layers: int = 0,
) -> None:
    """``out_k = undo * K[slots] - base_k``, ``out_v = V[slots] - base_v``, rounded once.

    Args:
        group: strided page group, caches ``[pages, kv_heads, tokens_per_page, 2 * head_dim]``.
        slots: int64 ``[tokens]``; negative = leave the token's output row as it is.
        undo: fp32 ``[tokens, rotary_dim / 2]``, ``R(-position)``.
        base_k, base_v: unrotated base KV ``[tokens, layers - skip_layers, kv_heads, head_dim]``,
            any strides with contiguous channels; None = zero, which stores the unrotated KV itself.
        out_k, out_v: rows of an arena, same shape; must not share memory with base or cache.
        skip_layers: leading layers that are left out (layer 0 has no deviation).

    Raises:
        ContractError: see :mod:`kvcomm_vllm.kernels.contract`.

    One launch. Moves at least ``2 * head_dim * (cache + base + out itemsize)`` bytes per token,
    layer and head.
    """
    a = group_arguments(group)
    check_slots(group, slots, slots)
    check_rotation(group, undo, len(slots))
    check_arena(group, "out", out_k, out_v, skip_layers)
    require(len(out_k) == len(slots), f"{len(out_k)} output rows for {len(slots)} slots")
    require((base_k is None) == (base_v is None), "give both of base_k and base_v, or none")
    if base_k is not None and base_v is not None:
        check_arena(group, "base", base_k, base_v, skip_layers)
        require(len(base_k) == len(slots), f"{len(base_k)} base rows for {len(slots)} slots")
    tokens, layers = len(slots), len(group.layers)
    if tokens == 0 or layers == skip_layers:
        return
    in_k, in_v = (out_k, out_v) if base_k is None or base_v is None else (base_k, base_v)
    block_tokens = tokens_per_block(group.head_dim, group.layers[0].dtype.itemsize)
    block_layers = layers_per_program(group.kv_heads, layers - skip_layers)
    grid = (cdiv(tokens, block_tokens), cdiv(layers - skip_layers, block_layers))
    collect_kernel[grid](
        a.pointers, slots.contiguous(), undo.cos, undo.sin, a.k_scales, a.v_scales,
        in_k, in_v, out_k, out_v,
        tokens, layers, skip_layers, *a.strides, *in_k.stride()[:3], *out_k.stride()[:3],
        **a.constants, BASE=base_k is not None, BT=block_tokens, BL=block_layers,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
