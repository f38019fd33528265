# SPDX-License-Identifier: Apache-2.0
"""Load with deviation: undo the rotation, add, rotate to the new position, in one pass."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvcomm_vllm.kernels import blocks
from kvcomm_vllm.kernels.coded import load_coded
from kvcomm_vllm.kernels.contract import (
    check_deviation,
    check_rotation,
    check_slots,
)
from kvcomm_vllm.kernels.deviation import AnchorSum, Deviation, MeanMap
from kvcomm_vllm.kernels.launch import (
    block_tokens_of,
    cdiv,
    group_arguments,
    layers_per_program,
)
from kvcomm_vllm.kernels.pages import PageGroup, Rotation


@triton.jit(do_not_specialize=["T", "L", "A", "SKIP"])
def load_sum_kernel(
    p_layers,
    p_src,
    p_dst,
    p_undo_cos,
    p_undo_sin,
    p_redo_cos,
    p_redo_sin,
    p_k_scales,
    p_v_scales,
    p_dk,
    p_dv,
    p_rows,
    p_wk,
    p_wv,
    T,
    L,
    A,
    SKIP,
    stride_page,
    stride_head,
    stride_token,
    stride_dk_row,
    stride_dk_layer,
    stride_dk_head,
    stride_dv_row,
    stride_dv_layer,
    stride_dv_head,
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
    WEIGHTED: tl.constexpr,
    BT: tl.constexpr,
    BL: tl.constexpr,
):
    """Program (i_t, i_l): BT tokens, all heads of BL layers; an inner loop sums over the anchors.

    Weights are ``[A, T]``; all are 1 where it is not WEIGHTED.
    """
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < T
    b_src = tl.load(p_src + o_t, mask=m_t, other=-1)
    b_dst = tl.load(p_dst + o_t, mask=m_t, other=-1)
    m = (b_src >= 0) & (b_dst >= 0)
    o_src = blocks.slot_offsets(b_src, PAGE, stride_page, stride_token)
    o_dst = blocks.slot_offsets(b_dst, PAGE, stride_page, stride_token)
    if HALF > 0:
        b_ucos, b_usin = blocks.load_factors(p_undo_cos, p_undo_sin, o_t, m, HALF, HALF_P)
        b_rcos, b_rsin = blocks.load_factors(p_redo_cos, p_redo_sin, o_t, m, HALF, HALF_P)
    for i in range(BL * H):
        i_l = tl.program_id(1) * BL + i // H
        i_h = tl.cast(i % H, tl.int64)
        if i_l < L:
            p_layer = blocks.layer_pointer(p_layers, i_l, ELEMENT)
            p_from = p_layer + o_src + i_h * stride_head
            b_a, b_b, b_c = blocks.load_key(
                p_from + K_AT, m, HALF, HALF_P, REST, REST_P, INTERLEAVED
            )
            b_v = blocks.load_row(p_from, m, V_AT, V, V_P)
            b_ks = tl.load(p_k_scales + i_l)
            b_vs = tl.load(p_v_scales + i_l)
            b_a = blocks.decode(b_a, FP8) * b_ks
            b_b = blocks.decode(b_b, FP8) * b_ks
            b_c = blocks.decode(b_c, FP8) * b_ks
            b_v = blocks.decode(b_v, FP8) * b_vs
            if HALF > 0:
                b_a, b_b = blocks.turn(b_a, b_b, b_ucos, b_usin)
            # Layers before SKIP have no deviation: their anchor loop is empty.
            n_a = tl.where(i_l >= SKIP, A, 0)
            i_d = tl.cast(i_l - SKIP, tl.int64)
            for i_a in range(n_a):
                b_row = tl.load(p_rows + tl.cast(i_a, tl.int64) * T + o_t, mask=m, other=-1)
                m_a = b_row >= 0
                o_k = b_row * stride_dk_row + i_d * stride_dk_layer + i_h * stride_dk_head
                o_v = b_row * stride_dv_row + i_d * stride_dv_layer + i_h * stride_dv_head
                b_da, b_db, b_dc = blocks.load_key(
                    p_dk + o_k, m_a, HALF, HALF_P, REST, REST_P, INTERLEAVED
                )
                b_dv = blocks.load_row(p_dv + o_v, m_a, 0, V, V_P).to(tl.float32)
                b_da = b_da.to(tl.float32)
                b_db = b_db.to(tl.float32)
                b_dc = b_dc.to(tl.float32)
                if WEIGHTED:
                    b_wk = tl.load(p_wk + tl.cast(i_a, tl.int64) * T + o_t, mask=m, other=0)
                    b_wv = tl.load(p_wv + tl.cast(i_a, tl.int64) * T + o_t, mask=m, other=0)
                    b_da = b_da * b_wk[:, None]
                    b_db = b_db * b_wk[:, None]
                    b_dc = b_dc * b_wk[:, None]
                    b_dv = b_dv * b_wv[:, None]
                b_a += b_da
                b_b += b_db
                b_c += b_dc
                b_v += b_dv
            if HALF > 0:
                b_a, b_b = blocks.turn(b_a, b_b, b_rcos, b_rsin)
            p_to = p_layer + o_dst + i_h * stride_head
            blocks.store_key(
                p_to + K_AT,
                blocks.encode(b_a / b_ks, ELEMENT, FP8),
                blocks.encode(b_b / b_ks, ELEMENT, FP8),
                blocks.encode(b_c / b_ks, ELEMENT, FP8),
                m,
                HALF,
                HALF_P,
                REST,
                REST_P,
                INTERLEAVED,
            )
            blocks.store_row(p_to, blocks.encode(b_v / b_vs, ELEMENT, FP8), m, V_AT, V, V_P)


@dataclass(frozen=True)
class _Sum:
    """An AnchorSum, or a MeanMap without codes seen as one anchor of weight 1."""

    dk: torch.Tensor
    dv: torch.Tensor
    rows: torch.Tensor
    wk: torch.Tensor
    wv: torch.Tensor
    weighted: bool

    @classmethod
    def of(cls, deviation: Deviation) -> _Sum:
        if isinstance(deviation, AnchorSum):
            rows, wk, wv = deviation.rows, deviation.wk.contiguous(), deviation.wv.contiguous()
            return cls(deviation.dk, deviation.dv, rows.contiguous(), wk, wv, True)
        dk, dv = deviation.mean_k, deviation.mean_v
        return cls(dk, dv, deviation.row.contiguous()[None], dk, dv, False)


def load_corrected(
    group: PageGroup,
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
    undo: Rotation,
    redo: Rotation,
    deviation: Deviation,
) -> None:
    """``K[dst] = redo * (undo * K[src] + dK)``, ``V[dst] = V[src] + dV``, rounded once.

    Args:
        group: strided or latent, caches ``[pages, kv_heads, tokens_per_page, row_dim]``.
        src_slots, dst_slots: int64 ``[tokens]``; overlap rules as in ``load``.
        undo, redo: fp32 ``[tokens, rotary_dim / 2]``, ``R(-old)`` and ``R(new)``.
        deviation: where dK and dV come from (paper Eq. 6, or mean plus code).

    Raises:
        ContractError: see :mod:`kvcomm_vllm.kernels.contract`.

    One launch. Moves at least ``2 * row_dim * itemsize`` bytes per token, layer and head, plus
    ``row_dim * itemsize`` of the arena per anchor (or of the mean); codes and their factor
    once.
    """
    a = group_arguments(group)
    check_slots(group, src_slots, dst_slots)
    check_rotation(group, undo, len(src_slots))
    check_rotation(group, redo, len(src_slots))
    check_deviation(group, deviation, len(src_slots))
    tokens, layers = len(src_slots), len(group.layers)
    if tokens == 0:
        return
    # Codes of no layer, where all are left out, have no factor to read.
    if isinstance(deviation, MeanMap) and deviation.code is not None and deviation.code.numel():
        load_coded(group, a, src_slots, dst_slots, undo, redo, deviation)
        return
    s = _Sum.of(deviation)
    block_tokens = block_tokens_of(group)
    block_layers = layers_per_program(group.kv_heads, layers)
    grid = (cdiv(tokens, block_tokens), cdiv(layers, block_layers))
    load_sum_kernel[grid](
        a.pointers, src_slots.contiguous(), dst_slots.contiguous(),
        undo.cos, undo.sin, redo.cos, redo.sin, a.k_scales, a.v_scales,
        s.dk, s.dv, s.rows, s.wk, s.wv,
        tokens, layers, len(s.rows), deviation.skip_layers, *a.strides,
        *s.dk.stride()[:3], *s.dv.stride()[:3],
        **a.constants, WEIGHTED=s.weighted, BT=block_tokens, BL=block_layers,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
