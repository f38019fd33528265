# SPDX-License-Identifier: Apache-2.0
"""Distances of a span to anchors: partial sums for the gate and for the paper's weights.

No atomics: every program writes its own partial sums and torch adds them, so results do not change
from run to run. They cover this rank's heads; tensor-parallel ranks add theirs up afterwards.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcomm_vllm.kernels import blocks
from kvcomm_vllm.kernels.contract import check_near, check_rotation, check_slots
from kvcomm_vllm.kernels.deviation import DistanceSums
from kvcomm_vllm.kernels.launch import block_tokens_of, cdiv, group_arguments
from kvcomm_vllm.kernels.pages import PageGroup, Rotation

# Heads per program, which share what is read of the rotation.
BLOCK_HEADS = 4


# Partial sums lie behind each other, so how they are aligned depends on their number.
@triton.jit(
    do_not_specialize=["T", "A"],
    do_not_specialize_on_alignment=["p_square_v", "p_abs_k", "p_abs_v"],
)
def distance_kernel(
    p_layers,
    p_slots,
    p_cos,
    p_sin,
    p_k_scales,
    p_v_scales,
    p_anchor_k,
    p_anchor_v,
    p_rows,
    p_square_v,
    p_abs_k,
    p_abs_v,
    T,
    A,
    stride_page,
    stride_head,
    stride_token,
    stride_ak_row,
    stride_ak_layer,
    stride_ak_head,
    stride_av_row,
    stride_av_layer,
    stride_av_head,
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
    BH: tl.constexpr,
):
    """Program (i_t, i_h, i_l): BH heads; a head's rows stay in registers while all anchors pass by.

    Writes three partial sums ``[L, H, A, T]`` over channels.
    """
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    i_l = tl.cast(tl.program_id(2), tl.int64)
    m_t = o_t < T
    b_slot = tl.load(p_slots + o_t, mask=m_t, other=-1)
    m = b_slot >= 0
    o_slot = blocks.slot_offsets(b_slot, PAGE, stride_page, stride_token)
    b_ks = tl.load(p_k_scales + i_l)
    b_vs = tl.load(p_v_scales + i_l)
    if HALF > 0:
        b_cos, b_sin = blocks.load_factors(p_cos, p_sin, o_t, m, HALF, HALF_P)
    for i in range(BH):
        i_h = tl.cast(tl.program_id(1) * BH + i, tl.int64)
        if i_h < H:
            p_from = blocks.layer_pointer(p_layers, i_l, ELEMENT) + o_slot + i_h * stride_head
            b_a, b_b, b_c = blocks.load_key(
                p_from + K_AT, m, HALF, HALF_P, REST, REST_P, INTERLEAVED
            )
            b_a = blocks.decode(b_a, FP8) * b_ks
            b_b = blocks.decode(b_b, FP8) * b_ks
            b_c = blocks.decode(b_c, FP8) * b_ks
            b_v = blocks.decode(blocks.load_row(p_from, m, V_AT, V, V_P), FP8) * b_vs
            if HALF > 0:
                b_a, b_b = blocks.turn(b_a, b_b, b_cos, b_sin)
            for i_a in range(A):
                o_out = tl.cast(i_a, tl.int64) * T + o_t
                b_row = tl.load(p_rows + o_out, mask=m, other=-1)
                # What a masked row reads is compared with nothing: its sums are set to zero.
                m_a = b_row >= 0
                o_k = b_row * stride_ak_row + i_l * stride_ak_layer + i_h * stride_ak_head
                o_v = b_row * stride_av_row + i_l * stride_av_layer + i_h * stride_av_head
                b_da, b_db, b_dc = blocks.load_key(
                    p_anchor_k + o_k, m_a, HALF, HALF_P, REST, REST_P, INTERLEAVED
                )
                b_dv = blocks.load_row(p_anchor_v + o_v, m_a, 0, V, V_P)
                b_dv = b_v - b_dv.to(tl.float32)
                b_sum_k = tl.sum(tl.abs(b_a - b_da.to(tl.float32)), 1)
                b_sum_k += tl.sum(tl.abs(b_b - b_db.to(tl.float32)), 1)
                b_sum_k += tl.sum(tl.abs(b_c - b_dc.to(tl.float32)), 1)
                b_sum_v = tl.sum(tl.abs(b_dv), 1)
                b_square = tl.sum(b_dv * b_dv, 1)
                o_out += ((i_l * H + i_h) * A) * T
                tl.store(p_abs_k + o_out, tl.where(m_a, b_sum_k, 0.0), mask=m_t)
                tl.store(p_abs_v + o_out, tl.where(m_a, b_sum_v, 0.0), mask=m_t)
                tl.store(p_square_v + o_out, tl.where(m_a, b_square, 0.0), mask=m_t)


def distance(
    group: PageGroup,
    slots: torch.Tensor,
    undo: Rotation,
    anchor_k: torch.Tensor,
    anchor_v: torch.Tensor,
    rows: torch.Tensor,
) -> DistanceSums:
    """Sums of differences between the span at ``slots`` and A anchors, in the unrotated frame.

    Args:
        group: strided or latent, caches ``[pages, kv_heads, tokens_per_page, row_dim]``.
        slots: int64 ``[tokens]``; a negative slot contributes zero.
        undo: fp32 ``[tokens, rotary_dim / 2]``, ``R(-position)``.
        anchor_k, anchor_v: arenas of anchors' base KV ``[arena_rows, layers, kv_heads, head_dim]``,
            V's with ``value_dim``.
        rows: int64 ``[anchors, tokens]``, the arena row each token is compared with; negative =
            none.

    Raises:
        ContractError: see :mod:`kvcomm_vllm.kernels.contract`.

    One launch. Moves at least ``row_dim * (cache itemsize + anchors * arena itemsize)`` bytes
    per token, layer and head (paper Eq. 5 and 6).
    """
    a = group_arguments(group)
    check_slots(group, slots, slots)
    check_rotation(group, undo, len(slots))
    check_near(group, anchor_k, anchor_v, rows, len(slots))
    slots, rows = slots.contiguous(), rows.contiguous()
    anchors, tokens = rows.shape
    layers, heads = len(group.layers), group.kv_heads
    parts = anchor_k.new_zeros((3, layers, heads, anchors, tokens), dtype=torch.float32)
    if anchors and tokens:
        block_tokens = block_tokens_of(group)
        block_heads = min(heads, BLOCK_HEADS)
        grid = (cdiv(tokens, block_tokens), cdiv(heads, block_heads), layers)
        distance_kernel[grid](
            a.pointers, slots, undo.cos, undo.sin, a.k_scales, a.v_scales,
            anchor_k, anchor_v, rows, *parts,
            tokens, anchors, *a.strides, *anchor_k.stride()[:3], *anchor_v.stride()[:3],
            **a.constants, BT=block_tokens, BH=block_heads,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    square_v, abs_k, abs_v = parts.sum((1, 2))
    return DistanceSums(square_v.sum(1), abs_k, abs_v)
