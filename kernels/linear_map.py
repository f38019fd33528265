# SPDX-License-Identifier: Apache-2.0
"""Load with the ``residual`` deviation: ``mean[index] + ((K, V) - x_mean) @ map``, per head."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcomm_vllm.kernels import blocks
from kvcomm_vllm.kernels.deviation import MeanMap
from kvcomm_vllm.kernels.launch import GroupArguments, cdiv, next_power
from kvcomm_vllm.kernels.pages import PageGroup, Rotation

# Input channels per step of the matrix product.
BLOCK_INPUTS = 32


def block_tokens(head_dim: int) -> int:
    """Tokens per program: what keeps both fp32 products in registers (at least 16)."""
    return max(16, min(64, 4096 // next_power(head_dim)))


@triton.jit
def add_product(b_y, b_x, p_row, m_row, o_col, m_col):
    """``y + x @ tile``, the tile taken from rows ``p_row`` and columns ``o_col`` of the map."""
    b_tile = tl.load(p_row[:, None] + o_col[None, :], mask=m_row[:, None] & m_col[None, :], other=0)
    return tl.dot(b_x.to(b_tile.dtype), b_tile, b_y)


@triton.jit
def add_products(
    b_t,
    b_yr,
    b_yc,
    b_yv,
    b_x,
    p_row,
    m_row,
    D: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    RANK: tl.constexpr,
):
    """Add ``x @ map`` for one chunk of input channels, whose map rows start at ``p_row``.

    Outputs: ``yr`` rotated channels (NeoX: the two halves padded one by one), ``yc`` the channels
    behind them, ``yv`` the value; or of a map of low rank ``t``, its RANK values in between.
    """
    if RANK > 0:
        o_r = tl.arange(0, b_t.shape[1])
        return add_product(b_t, b_x, p_row, m_row, o_r, o_r < RANK), b_yr, b_yc, b_yv
    if HALF > 0:
        HALF_P: tl.constexpr = b_yr.shape[1] // 2
        o_r = tl.arange(0, 2 * HALF_P)
        if INTERLEAVED:
            m_r = o_r < 2 * HALF
        else:
            m_r = o_r % HALF_P < HALF
            o_r = (o_r // HALF_P) * HALF + o_r % HALF_P
        b_yr = add_product(b_yr, b_x, p_row, m_row, o_r, m_r)
    if REST > 0:
        o_c = tl.arange(0, b_yc.shape[1])
        b_yc = add_product(b_yc, b_x, p_row, m_row, 2 * HALF + o_c, o_c < REST)
    o_v = tl.arange(0, b_yv.shape[1])
    b_yv = add_product(b_yv, b_x, p_row, m_row, D + o_v, o_v < D)
    return b_t, b_yr, b_yc, b_yv


@triton.jit
def load_map_kernel(
    p_layers,
    p_src,
    p_dst,
    p_undo_cos,
    p_undo_sin,
    p_redo_cos,
    p_redo_sin,
    p_k_scales,
    p_v_scales,
    p_mean_k,
    p_mean_v,
    p_index,
    p_map,
    p_up,
    p_x_mean,
    T,
    M,
    SKIP,
    stride_page,
    stride_head,
    stride_token,
    stride_m_layer,
    stride_m_row,
    stride_m_head,
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
    CENTRED: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Program (i_t, i_h, i_l): BT tokens of one head; programs of one map run side by side.

    A matrix product over chunks of BK input channels, then the sum, which reads the page again
    (from L1) instead of holding it in registers. Barriers keep the compiler from loading everything
    at once, and keep warps that read from warps that write. Layers before SKIP have no deviation.
    With a map of low rank (RANK > 0) the chunks add up to RANK values a token, and one more
    product follows.
    """
    COLUMNS: tl.constexpr = RANK if RANK > 0 else 2 * D
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    i_h = tl.cast(tl.program_id(1), tl.int64)
    i_l = tl.program_id(2)
    m_t = o_t < T
    b_src = tl.load(p_src + o_t, mask=m_t, other=-1)
    b_dst = tl.load(p_dst + o_t, mask=m_t, other=-1)
    m = (b_src >= 0) & (b_dst >= 0)
    p_layer = blocks.layer_pointer(p_layers, i_l, ELEMENT) + i_h * stride_head
    p_from = p_layer + blocks.slot_offsets(b_src, PAGE, stride_page, stride_token)
    b_ks = tl.load(p_k_scales + i_l)
    b_vs = tl.load(p_v_scales + i_l)
    i_d = tl.cast(tl.maximum(i_l - SKIP, 0), tl.int64)
    m_d = m & (o_t * 0 + i_l >= SKIP)
    b_t = tl.zeros((BT, RANK_P), tl.float32)
    b_yr = tl.zeros((BT, 2 * HALF_P), tl.float32)
    b_yc = tl.zeros((BT, REST_P), tl.float32)
    b_yv = tl.zeros((BT, D_P), tl.float32)
    if i_l >= SKIP:
        p_cos = p_undo_cos + o_t.to(tl.int64) * HALF
        p_sin = p_undo_sin + o_t.to(tl.int64) * HALF
        p_head = p_map + (i_d * H + i_h) * (2 * D * COLUMNS)
        p_centre = p_x_mean + (i_d * H + i_h) * (2 * D)
        o_k = tl.arange(0, BK)
        for first in range(0, HALF, BK):
            o_a = first + o_k
            m_a = o_a < HALF
            m_ta = m[:, None] & m_a[None, :]
            b_cos = tl.load(p_cos[:, None] + o_a[None, :], mask=m_ta, other=0)
            b_sin = tl.load(p_sin[:, None] + o_a[None, :], mask=m_ta, other=0)
            if INTERLEAVED:
                o_x = 2 * first + tl.arange(0, 2 * BK)
                m_x = o_x < 2 * HALF
                b_x = tl.load(
                    p_from[:, None] + o_x[None, :], mask=m[:, None] & m_x[None, :], other=0
                )
                b_a, b_b = tl.split(tl.reshape(blocks.decode(b_x, FP8) * b_ks, (BT, BK, 2)))
                b_a, b_b = blocks.turn(b_a, b_b, b_cos, b_sin)
                b_x = tl.interleave(b_a, b_b)
                if CENTRED:
                    b_x -= tl.load(p_centre + o_x, mask=m_x, other=0)[None, :]
                b_t, b_yr, b_yc, b_yv = add_products(
                    b_t, b_yr, b_yc, b_yv, b_x, p_head + o_x * COLUMNS, m_x,
                    D, HALF, REST, True, RANK,
                )  # fmt: skip
            else:
                b_a = tl.load(p_from[:, None] + o_a[None, :], mask=m_ta, other=0)
                b_b = tl.load(p_from[:, None] + (HALF + o_a)[None, :], mask=m_ta, other=0)
                b_a, b_b = blocks.turn(
                    blocks.decode(b_a, FP8) * b_ks, blocks.decode(b_b, FP8) * b_ks, b_cos, b_sin
                )
                if CENTRED:
                    b_a -= tl.load(p_centre + o_a, mask=m_a, other=0)[None, :]
                    b_b -= tl.load(p_centre + HALF + o_a, mask=m_a, other=0)[None, :]
                p_row = p_head + o_a * COLUMNS
                b_t, b_yr, b_yc, b_yv = add_products(
                    b_t, b_yr, b_yc, b_yv, b_a, p_row, m_a, D, HALF, REST, False, RANK
                )
                b_t, b_yr, b_yc, b_yv = add_products(
                    b_t, b_yr, b_yc, b_yv, b_b, p_row + HALF * COLUMNS, m_a,
                    D, HALF, REST, False, RANK,
                )  # fmt: skip
        # Channels that are not rotated: what is left of K, then V; they lie one behind the other.
        for first in range(2 * HALF, 2 * D, BK):
            o_x = first + o_k
            m_x = o_x < 2 * D
            b_x = tl.load(p_from[:, None] + o_x[None, :], mask=m[:, None] & m_x[None, :], other=0)
            b_x = blocks.decode(b_x, FP8) * tl.where(o_x < D, b_ks, b_vs)[None, :]
            if CENTRED:
                b_x -= tl.load(p_centre + o_x, mask=m_x, other=0)[None, :]
            b_t, b_yr, b_yc, b_yv = add_products(
                b_t, b_yr, b_yc, b_yv, b_x, p_head + o_x * COLUMNS, m_x,
                D, HALF, REST, INTERLEAVED, RANK,
            )  # fmt: skip
        if RANK > 0:
            o_r = tl.arange(0, RANK_P)
            p_row = p_up + (i_d * H + i_h) * (2 * D * RANK) + o_r * (2 * D)
            b_t, b_yr, b_yc, b_yv = add_products(
                b_t, b_yr, b_yc, b_yv, b_t, p_row, o_r < RANK, D, HALF, REST, INTERLEAVED, 0
            )
    tl.debug_barrier()
    b_i = tl.minimum(tl.load(p_index + o_t, mask=m, other=0), M).to(tl.int64)
    o_m = b_i * stride_m_row + i_d * stride_m_layer + i_h * stride_m_head
    b_v = blocks.decode(blocks.load_row(p_from, m, D, D, D_P), FP8) * b_vs
    b_v += blocks.load_row(p_mean_v + o_m, m_d, 0, D, D_P).to(tl.float32) + b_yv
    b_v = blocks.encode(b_v / b_vs, ELEMENT, FP8)
    tl.debug_barrier()
    b_a, b_b, b_c = blocks.load_key(p_from, m, HALF, HALF_P, REST, REST_P, INTERLEAVED)
    b_a = blocks.decode(b_a, FP8) * b_ks
    b_b = blocks.decode(b_b, FP8) * b_ks
    b_c = blocks.decode(b_c, FP8) * b_ks
    if HALF > 0:
        b_cos, b_sin = blocks.load_factors(p_undo_cos, p_undo_sin, o_t, m, HALF, HALF_P)
        b_a, b_b = blocks.turn(b_a, b_b, b_cos, b_sin)
        if INTERLEAVED:
            b_ya, b_yb = tl.split(tl.reshape(b_yr, (BT, HALF_P, 2)))
        else:
            b_ya, b_yb = tl.split(tl.permute(tl.reshape(b_yr, (BT, 2, HALF_P)), (0, 2, 1)))
        b_a += b_ya
        b_b += b_yb
    tl.debug_barrier()
    b_da, b_db, b_dc = blocks.load_key(p_mean_k + o_m, m_d, HALF, HALF_P, REST, REST_P, INTERLEAVED)
    b_a += b_da.to(tl.float32)
    b_b += b_db.to(tl.float32)
    b_c += b_dc.to(tl.float32) + b_yc
    if HALF > 0:
        b_cos, b_sin = blocks.load_factors(p_redo_cos, p_redo_sin, o_t, m, HALF, HALF_P)
        b_a, b_b = blocks.turn(b_a, b_b, b_cos, b_sin)
    p_to = p_layer + blocks.slot_offsets(b_dst, PAGE, stride_page, stride_token)
    b_a = blocks.encode(b_a / b_ks, ELEMENT, FP8)
    b_b = blocks.encode(b_b / b_ks, ELEMENT, FP8)
    b_c = blocks.encode(b_c / b_ks, ELEMENT, FP8)
    blocks.store_key(p_to, b_a, b_b, b_c, m, HALF, HALF_P, REST, REST_P, INTERLEAVED)
    blocks.store_row(p_to, b_v, m, D, D, D_P)


def map_constants(constants: dict[str, object], rank: int) -> dict[str, object]:
    """Shape constants with blocks at least 16 wide, the least a matrix product takes.

    Args:
        rank: of the map, 0 for a whole one.
    """
    widths = {key: max(16, int(str(constants[key]))) for key in ("D_P", "HALF_P", "REST_P")}
    return {**constants, **widths, "RANK": rank, "RANK_P": max(16, next_power(rank))}


def load_mapped(
    group: PageGroup,
    arguments: GroupArguments,
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
    undo: Rotation,
    redo: Rotation,
    deviation: MeanMap,
) -> None:
    """Launch for :func:`kvcomm_vllm.kernels.correct.load_corrected`, which has checked everything.

    The products run in the map's dtype (fp32 maps as TF32 on tensor cores) with fp32 sums.
    """
    a, d, tokens = arguments, deviation, len(src_slots)
    x_mean = d.x_mean if d.x_mean is not None else d.map
    up = d.up if d.up is not None else d.map
    rows = block_tokens(group.head_dim)
    grid = (cdiv(tokens, rows), group.kv_heads, len(group.layers))
    load_map_kernel[grid](
        a.pointers, src_slots.contiguous(), dst_slots.contiguous(),
        undo.cos, undo.sin, redo.cos, redo.sin, a.k_scales, a.v_scales,
        d.mean_k, d.mean_v, d.index.contiguous(), d.map, up, x_mean,
        tokens, d.mean_k.shape[1] - 1, d.skip_layers, *a.strides, *d.mean_k.stride()[:3],
        **map_constants(a.constants, d.rank), CENTRED=d.x_mean is not None,
        BT=rows, BK=BLOCK_INPUTS, num_warps=8, enable_fp_fusion=True, num_stages=2,
    )  # fmt: skip
