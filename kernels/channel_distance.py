# SPDX-License-Identifier: Apache-2.0
"""Squared distances per (anchor, layer, head, channel), summed over tokens (paper Eq. 7)."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcomm_vllm.kernels import blocks
from kvcomm_vllm.kernels.launch import GroupArguments, cdiv, next_power
from kvcomm_vllm.kernels.pages import PageGroup, Rotation

# Tokens per program: its partial sums (one row per anchor) are 1/64 of what it reads, in fp32.
CHUNK_TOKENS = 128
MAX_BLOCK_ANCHORS = 32


@triton.jit
def channel_distance_kernel(
    p_layers,
    p_slots,
    p_cos,
    p_sin,
    p_k_scales,
    p_v_scales,
    p_anchor_k,
    p_anchor_v,
    p_rows,
    p_out_k,
    p_out_v,
    T,
    A,
    stride_page,
    stride_head,
    stride_token,
    stride_a_row,
    stride_a_layer,
    stride_a_head,
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
    BA: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (i_a, i_t, i_l * H + i_h): BA anchors against CHUNK tokens of one head in turn.

    A block is ``[anchors, channels]``, so a token's own row is read once for all anchors and
    nothing is reduced across threads. Writes partial sums ``[chunks, L, H, A, D]``.
    """
    o_a = tl.program_id(0) * BA + tl.arange(0, BA)
    m_a = o_a < A
    i_h = tl.cast(tl.program_id(2) % H, tl.int64)
    i_l = tl.cast(tl.program_id(2) // H, tl.int64)
    p_layer = blocks.layer_pointer(p_layers, i_l, ELEMENT) + i_h * stride_head
    b_ks = tl.load(p_k_scales + i_l)
    b_vs = tl.load(p_v_scales + i_l)
    b_sa = tl.zeros((BA, HALF_P), tl.float32)
    b_sb = tl.zeros((BA, HALF_P), tl.float32)
    b_sc = tl.zeros((BA, REST_P), tl.float32)
    b_sv = tl.zeros((BA, D_P), tl.float32)
    first = tl.program_id(1) * CHUNK
    for i_t in range(first, tl.minimum(first + CHUNK, T)):
        o_t = tl.zeros((1,), tl.int64) + i_t
        b_slot = tl.load(p_slots + o_t)
        m = b_slot >= 0
        p_from = p_layer + blocks.slot_offsets(b_slot, PAGE, stride_page, stride_token)
        b_a, b_b, b_c = blocks.load_key(p_from, m, HALF, HALF_P, REST, REST_P, INTERLEAVED)
        b_v = blocks.load_row(p_from, m, D, D, D_P)
        b_a = blocks.decode(b_a, FP8) * b_ks
        b_b = blocks.decode(b_b, FP8) * b_ks
        b_c = blocks.decode(b_c, FP8) * b_ks
        b_v = blocks.decode(b_v, FP8) * b_vs
        if HALF > 0:
            b_cos, b_sin = blocks.load_factors(p_cos, p_sin, o_t, m, HALF, HALF_P)
            b_a, b_b = blocks.turn(b_a, b_b, b_cos, b_sin)
        b_row = tl.load(p_rows + tl.cast(o_a, tl.int64) * T + o_t, mask=m_a, other=-1)
        m_row = (b_row >= 0) & m
        o_row = b_row * stride_a_row + i_l * stride_a_layer + i_h * stride_a_head
        b_da, b_db, b_dc = blocks.load_key(
            p_anchor_k + o_row, m_row, HALF, HALF_P, REST, REST_P, INTERLEAVED
        )
        b_dv = blocks.load_row(p_anchor_v + o_row, m_row, 0, D, D_P)
        m_row = m_row[:, None]
        b_da = tl.where(m_row, b_a - b_da.to(tl.float32), 0.0)
        b_db = tl.where(m_row, b_b - b_db.to(tl.float32), 0.0)
        b_dc = tl.where(m_row, b_c - b_dc.to(tl.float32), 0.0)
        b_dv = tl.where(m_row, b_v - b_dv.to(tl.float32), 0.0)
        b_sa += b_da * b_da
        b_sb += b_db * b_db
        b_sc += b_dc * b_dc
        b_sv += b_dv * b_dv
    o_out = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * A + o_a
    blocks.store_key(
        p_out_k + o_out * D, b_sa, b_sb, b_sc, m_a, HALF, HALF_P, REST, REST_P, INTERLEAVED
    )
    blocks.store_row(p_out_v + o_out * D, b_sv, m_a, 0, D, D_P)


def channel_sums(
    group: PageGroup,
    arguments: GroupArguments,
    slots: torch.Tensor,
    undo: Rotation,
    anchor_k: torch.Tensor,
    anchor_v: torch.Tensor,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch for :func:`kvcomm_vllm.kernels.distance.distance`, which has checked everything.

    Returns fp32 ``[anchors, layers, kv_heads, head_dim]`` for K and for V.
    """
    a = arguments
    anchors, tokens = rows.shape
    layers, heads = len(group.layers), group.kv_heads
    chunks = max(1, cdiv(tokens, CHUNK_TOKENS))
    parts = anchor_k.new_zeros(
        (2, chunks, layers, heads, anchors, group.head_dim), dtype=torch.float32
    )
    if anchors and tokens:
        block_anchors = min(MAX_BLOCK_ANCHORS, next_power(anchors))
        channel_distance_kernel[(cdiv(anchors, block_anchors), chunks, layers * heads)](
            a.pointers, slots, undo.cos, undo.sin, a.k_scales, a.v_scales,
            anchor_k, anchor_v, rows, *parts,
            tokens, anchors, *a.strides, *anchor_k.stride()[:3],
            **a.constants, BA=block_anchors, CHUNK=CHUNK_TOKENS,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    channel_k, channel_v = parts.sum(1).permute(0, 3, 1, 2, 4)
    return channel_k, channel_v
