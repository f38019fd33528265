# SPDX-License-Identifier: Apache-2.0
"""Load without deviation: ``K[dst] = turn * K[src]``, ``V[dst] = V[src]``."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcomm_vllm.kernels import blocks
from kvcomm_vllm.kernels.contract import check_rotation, check_slots
from kvcomm_vllm.kernels.launch import (
    block_tokens_of,
    cdiv,
    group_arguments,
    layers_per_program,
)
from kvcomm_vllm.kernels.pages import PageGroup, Rotation


@triton.jit(do_not_specialize=["T", "L"])
def load_kernel(
    p_layers,
    p_src,
    p_dst,
    p_cos,
    p_sin,
    T,
    L,
    stride_page,
    stride_head,
    stride_token,
    H: tl.constexpr,
    PAGE: tl.constexpr,
    K_AT: tl.constexpr,
    V_AT: tl.constexpr,
    V: tl.constexpr,
    V_P: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST: tl.constexpr,
    REST_P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ELEMENT: tl.constexpr,
    FP8: tl.constexpr,
    BT: tl.constexpr,
    BL: tl.constexpr,
):
    """Program (i_t, i_l): BT tokens, all heads of BL layers. An fp8 scale cancels: none is read."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < T
    b_src = tl.load(p_src + o_t, mask=m_t, other=-1)
    b_dst = tl.load(p_dst + o_t, mask=m_t, other=-1)
    m = (b_src >= 0) & (b_dst >= 0)
    o_src = blocks.slot_offsets(b_src, PAGE, stride_page, stride_token)
    o_dst = blocks.slot_offsets(b_dst, PAGE, stride_page, stride_token)
    if HALF > 0:
        b_cos, b_sin = blocks.load_factors(p_cos, p_sin, o_t, m, HALF, HALF_P)
    for i in range(BL * H):
        i_l = tl.program_id(1) * BL + i // H
        if i_l < L:
            p_layer = blocks.layer_pointer(p_layers, i_l, ELEMENT)
            p_from = p_layer + o_src + tl.cast(i % H, tl.int64) * stride_head
            p_to = p_layer + o_dst + tl.cast(i % H, tl.int64) * stride_head
            b_a, b_b, b_c = blocks.load_key(
                p_from + K_AT, m, HALF, HALF_P, REST, REST_P, INTERLEAVED
            )
            b_v = blocks.load_row(p_from, m, V_AT, V, V_P)
            if HALF > 0:
                b_x, b_y = blocks.turn(
                    blocks.decode(b_a, FP8), blocks.decode(b_b, FP8), b_cos, b_sin
                )
                b_a = blocks.encode(b_x, ELEMENT, FP8)
                b_b = blocks.encode(b_y, ELEMENT, FP8)
            p_key = p_to + K_AT
            blocks.store_key(p_key, b_a, b_b, b_c, m, HALF, HALF_P, REST, REST_P, INTERLEAVED)
            blocks.store_row(p_to, b_v, m, V_AT, V, V_P)


def load(
    group: PageGroup, src_slots: torch.Tensor, dst_slots: torch.Tensor, turn: Rotation
) -> None:
    """``K[dst] = turn * K[src]``, ``V[dst] = V[src]`` in all layers of a group, one launch.

    Args:
        group: strided or latent, caches ``[pages, kv_heads, tokens_per_page, row_dim]``.
        src_slots, dst_slots: int64 ``[tokens]``; negative = skip the token. A destination occurs
            once; a token may be its own source (in place), no other overlap.
        turn: fp32 ``[tokens, rotary_dim / 2]`` factors, ``R(new) R(-old)``.

    Raises:
        ContractError: see :mod:`kvcomm_vllm.kernels.contract`.

    Moves at least ``2 * row_dim * itemsize`` bytes per token, layer and head.
    """
    a = group_arguments(group)
    check_slots(group, src_slots, dst_slots)
    check_rotation(group, turn, len(src_slots))
    tokens, layers = len(src_slots), len(group.layers)
    if tokens == 0:
        return
    block_tokens = block_tokens_of(group)
    block_layers = layers_per_program(group.kv_heads, layers)
    grid = (cdiv(tokens, block_tokens), cdiv(layers, block_layers))
    load_kernel[grid](
        a.pointers, src_slots.contiguous(), dst_slots.contiguous(), turn.cos, turn.sin,
        tokens, layers, *a.strides,
        **a.constants, BT=block_tokens, BL=block_layers,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
