# SPDX-License-Identifier: Apache-2.0
"""Load with the ``residual`` deviation: ``mean[row] + code @ up``, codes shared by all heads.

Tokens of any placeholders go into one launch. A block multiplies by the factor of each placeholder
it has tokens of, with the codes of all others set to 0: one product where the block is of one.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcomm_vllm.kernels import blocks
from kvcomm_vllm.kernels.deviation import MeanMap
from kvcomm_vllm.kernels.launch import GroupArguments, cdiv, next_power
from kvcomm_vllm.kernels.pages import PageGroup, Rotation

# Longest code that a program keeps whole; of longer ones it reads so many numbers at a time as
# registers are left for.
BLOCK_RANK, PIECE = 64, 16


def block_tokens(channels: int) -> int:
    """Tokens per program: what keeps a row, its deviation and its turns in registers.

    Args:
        channels: of K or of V, whichever has more.
    """
    return max(16, min(64, 4096 // next_power(channels)))


@triton.jit
def load_code(p_row, m_row, first, TYPE: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr):
    """BR numbers of each token's code, from number ``first`` on."""
    o_r = first + tl.arange(0, BR)
    m = m_row[:, None] & (o_r < RANK)[None, :]
    return tl.load(p_row[:, None] + o_r[None, :], mask=m, other=0).to(TYPE)


@triton.jit
def only(b_code, b_entry, i_e):
    """The codes of one entry's tokens, 0 for all others."""
    return tl.where((b_entry == i_e)[:, None], b_code, 0.0).to(b_code.dtype)


@triton.jit
def entry_below(b_entry, i_e):
    """The highest entry below ``i_e`` that a token has; negative if there is none."""
    return tl.max(tl.where(b_entry < i_e, b_entry, -1), 0)


@triton.jit(do_not_specialize=["T", "L", "SKIP"])
def load_coded_kernel(
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
    p_row,
    p_code,
    p_up,
    p_entry,
    T,
    L,
    SKIP,
    stride_page,
    stride_head,
    stride_token,
    stride_mk_row,
    stride_mk_layer,
    stride_mk_head,
    stride_mv_row,
    stride_mv_layer,
    stride_mv_head,
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
    RANK: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
):
    """Program (i_t, i_l): BT tokens of one layer, head by head; codes of up to BR numbers and the
    rotations are read once for all of them.

    ``up`` is read in a key's channel order, so that each block of K meets a product of its own
    shape. V is stored before K is begun, which halves what lies in registers. Layers before SKIP
    have no deviation: their code is 0, whatever is read of ``up`` (which must have a layer).
    """
    BOTH: tl.constexpr = 2 * HALF + REST + V
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    i_l = tl.program_id(1)
    m_t = o_t < T
    b_src = tl.load(p_src + o_t, mask=m_t, other=-1)
    b_dst = tl.load(p_dst + o_t, mask=m_t, other=-1)
    m = (b_src >= 0) & (b_dst >= 0)
    m_d = m & (o_t * 0 + i_l >= SKIP)
    p_layer = blocks.layer_pointer(p_layers, i_l, ELEMENT)
    o_src = blocks.slot_offsets(b_src, PAGE, stride_page, stride_token)
    o_dst = blocks.slot_offsets(b_dst, PAGE, stride_page, stride_token)
    b_ks = tl.load(p_k_scales + i_l)
    b_vs = tl.load(p_v_scales + i_l)
    i_d = tl.cast(tl.maximum(i_l - SKIP, 0), tl.int64)
    b_row = tl.load(p_row + o_t, mask=m, other=0)
    o_mean_k = b_row * stride_mk_row + i_d * stride_mk_layer
    o_mean_v = b_row * stride_mv_row + i_d * stride_mv_layer
    p_codes = p_code + (o_t.to(tl.int64) * (L - SKIP) + i_d) * RANK
    b_entry = tl.load(p_entry + o_t, mask=m_d, other=-1)
    i_top = tl.max(b_entry, 0)
    layer_heads = tl.cast((L - SKIP) * H, tl.int64)
    if HALF > 0:
        b_ucos, b_usin = blocks.load_factors(p_undo_cos, p_undo_sin, o_t, m, HALF, HALF_P)
        b_rcos, b_rsin = blocks.load_factors(p_redo_cos, p_redo_sin, o_t, m, HALF, HALF_P)
    if RANK <= BR:
        b_code = load_code(p_codes, m_d, 0, p_up.dtype.element_ty, RANK, BR)
    for head in range(H):
        i_h = tl.cast(head, tl.int64)
        o_up = i_d * H + i_h
        p_from = p_layer + o_src + i_h * stride_head
        p_to = p_layer + o_dst + i_h * stride_head
        b_y = tl.zeros((BT, V_P), tl.float32)
        i_e = i_top
        while i_e >= 0:
            p_head = p_up + (tl.cast(i_e, tl.int64) * layer_heads + o_up) * (BOTH * RANK)
            for first in range(0, RANK, BR):
                if RANK > BR:
                    b_code = load_code(p_codes, m_d, first, p_up.dtype.element_ty, RANK, BR)
                o_r = first + tl.arange(0, BR)
                b_up = blocks.load_row(p_head + o_r * BOTH, o_r < RANK, BOTH - V, V, V_P)
                b_y = tl.dot(only(b_code, b_entry, i_e), b_up, b_y)
            i_e = entry_below(b_entry, i_e)
        b_v = blocks.decode(blocks.load_row(p_from, m, V_AT, V, V_P), FP8) * b_vs
        p_mean = p_mean_v + o_mean_v + i_h * stride_mv_head
        b_v += blocks.load_row(p_mean, m_d, 0, V, V_P).to(tl.float32) + b_y
        blocks.store_row(p_to, blocks.encode(b_v / b_vs, ELEMENT, FP8), m, V_AT, V, V_P)
        b_ya = tl.zeros((BT, HALF_P), tl.float32)
        b_yb = tl.zeros((BT, HALF_P), tl.float32)
        b_yc = tl.zeros((BT, REST_P), tl.float32)
        i_e = i_top
        while i_e >= 0:
            p_head = p_up + (tl.cast(i_e, tl.int64) * layer_heads + o_up) * (BOTH * RANK)
            for first in range(0, RANK, BR):
                if RANK > BR:
                    b_code = load_code(p_codes, m_d, first, p_up.dtype.element_ty, RANK, BR)
                o_r = first + tl.arange(0, BR)
                b_mine = only(b_code, b_entry, i_e)
                b_a, b_b, b_c = blocks.load_key(
                    p_head + o_r * BOTH, o_r < RANK, HALF, HALF_P, REST, REST_P, INTERLEAVED
                )
                if HALF > 0:
                    b_ya = tl.dot(b_mine, b_a, b_ya)
                    b_yb = tl.dot(b_mine, b_b, b_yb)
                if REST > 0:
                    b_yc = tl.dot(b_mine, b_c, b_yc)
            i_e = entry_below(b_entry, i_e)
        b_a, b_b, b_c = blocks.load_key(p_from + K_AT, m, HALF, HALF_P, REST, REST_P, INTERLEAVED)
        b_a = blocks.decode(b_a, FP8) * b_ks
        b_b = blocks.decode(b_b, FP8) * b_ks
        b_c = blocks.decode(b_c, FP8) * b_ks
        if HALF > 0:
            b_a, b_b = blocks.turn(b_a, b_b, b_ucos, b_usin)
        b_da, b_db, b_dc = blocks.load_key(
            p_mean_k + o_mean_k + i_h * stride_mk_head,
            m_d,
            HALF,
            HALF_P,
            REST,
            REST_P,
            INTERLEAVED,
        )
        b_a += b_da.to(tl.float32) + b_ya
        b_b += b_db.to(tl.float32) + b_yb
        b_c += b_dc.to(tl.float32) + b_yc
        if HALF > 0:
            b_a, b_b = blocks.turn(b_a, b_b, b_rcos, b_rsin)
        b_a = blocks.encode(b_a / b_ks, ELEMENT, FP8)
        b_b = blocks.encode(b_b / b_ks, ELEMENT, FP8)
        b_c = blocks.encode(b_c / b_ks, ELEMENT, FP8)
        blocks.store_key(p_to + K_AT, b_a, b_b, b_c, m, HALF, HALF_P, REST, REST_P, INTERLEAVED)


def code_constants(constants: dict[str, object], rank: int) -> dict[str, object]:
    """Shape constants with blocks at least 16 wide, the least a matrix product takes."""
    widths = {key: max(16, int(str(constants[key]))) for key in ("V_P", "HALF_P", "REST_P")}
    block = max(16, next_power(rank)) if rank <= BLOCK_RANK else PIECE
    return {**constants, **widths, "RANK": rank, "BR": block}


def load_coded(
    group: PageGroup,
    arguments: GroupArguments,
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
    undo: Rotation,
    redo: Rotation,
    deviation: MeanMap,
) -> None:
    """Launch for :func:`kvcomm_vllm.kernels.correct.load_corrected`, which has checked everything.

    The products run in the dtype of ``up`` (fp32 as TF32 on tensor cores) with fp32 sums.
    """
    a, d, tokens, layers = arguments, deviation, len(src_slots), len(group.layers)
    assert d.entry is not None
    rows = block_tokens(group.widest)
    load_coded_kernel[(cdiv(tokens, rows), layers)](
        a.pointers, src_slots.contiguous(), dst_slots.contiguous(),
        undo.cos, undo.sin, redo.cos, redo.sin, a.k_scales, a.v_scales,
        d.mean_k, d.mean_v, d.row.contiguous(), d.code, d.up, d.entry.contiguous(),
        tokens, layers, d.skip_layers, *a.strides,
        *d.mean_k.stride()[:3], *d.mean_v.stride()[:3],
        **code_constants(a.constants, d.rank), BT=rows, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
