# SPDX-License-Identifier: Apache-2.0
"""Collect: KV in the unrotated frame, out of its pages."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcomm_vllm.kernels import blocks
from kvcomm_vllm.kernels.contract import check_out, check_read, check_rotation
from kvcomm_vllm.kernels.launch import (
    block_tokens_of,
    cdiv,
    group_arguments,
    layers_per_program,
)
from kvcomm_vllm.kernels.pages import PageGroup, Rotation


@triton.jit(do_not_specialize=["T", "L"])
def collect_kernel(
    p_layers,
    p_slots,
    p_cos,
    p_sin,
    p_k_scales,
    p_v_scales,
    p_out_k,
    p_out_v,
    T,
    L,
    stride_page,
    stride_head,
    stride_token,
    stride_ok_row,
    stride_ok_layer,
    stride_ok_head,
    stride_ov_row,
    stride_ov_layer,
    stride_ov_head,
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
    """Program (i_t, i_l): BT tokens, all heads of BL layers."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    b_slot = tl.load(p_slots + o_t, mask=o_t < T, other=-1)
    m = b_slot >= 0
    o_slot = blocks.slot_offsets(b_slot, PAGE, stride_page, stride_token)
    if HALF > 0:
        b_cos, b_sin = blocks.load_factors(p_cos, p_sin, o_t, m, HALF, HALF_P)
    for i in range(BL * H):
        i_l = tl.cast(tl.program_id(1) * BL + i // H, tl.int64)
        i_h = tl.cast(i % H, tl.int64)
        if i_l < L:
            p_from = blocks.layer_pointer(p_layers, i_l, ELEMENT) + o_slot + i_h * stride_head
            b_a, b_b, b_c = blocks.load_key(
                p_from + K_AT, m, HALF, HALF_P, REST, REST_P, INTERLEAVED
            )
            b_v = blocks.load_row(p_from, m, V_AT, V, V_P)
            b_ks = tl.load(p_k_scales + i_l)
            b_a = blocks.decode(b_a, FP8) * b_ks
            b_b = blocks.decode(b_b, FP8) * b_ks
            b_c = blocks.decode(b_c, FP8) * b_ks
            b_v = blocks.decode(b_v, FP8) * tl.load(p_v_scales + i_l)
            if HALF > 0:
                b_a, b_b = blocks.turn(b_a, b_b, b_cos, b_sin)
            o_k = o_t.to(tl.int64) * stride_ok_row + i_l * stride_ok_layer + i_h * stride_ok_head
            o_v = o_t.to(tl.int64) * stride_ov_row + i_l * stride_ov_layer + i_h * stride_ov_head
            OUT: tl.constexpr = p_out_k.dtype.element_ty
            blocks.store_key(
                p_out_k + o_k,
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
            blocks.store_row(p_out_v + o_v, b_v.to(OUT), m, 0, V, V_P)


def collect(
    group: PageGroup,
    slots: torch.Tensor,
    undo: Rotation,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
) -> None:
    """``out_k = undo * K[slots]``, ``out_v = V[slots]``, rounded once.

    Args:
        group: strided or latent, caches ``[pages, kv_heads, tokens_per_page, row_dim]``.
        slots: int64 ``[tokens]``; negative = leave the token's output row as it is.
        undo: fp32 ``[tokens, rotary_dim / 2]``, ``R(-position)``.
        out_k, out_v: ``[tokens, layers, kv_heads, head_dim]``, V with ``value_dim``, any strides
            with contiguous channels; must not share memory with the cache.

    Raises:
        ContractError: see :mod:`kvcomm_vllm.kernels.contract`.

    One launch. Moves at least ``row_dim * (cache + out itemsize)`` bytes per token, layer and head.
    """
    a = group_arguments(group)
    check_read(group, slots)
    check_rotation(group, undo, len(slots))
    check_out(group, out_k, out_v, len(slots))
    tokens, layers = len(slots), len(group.layers)
    if tokens == 0:
        return
    block_tokens = block_tokens_of(group)
    block_layers = layers_per_program(group.kv_heads, layers)
    collect_kernel[(cdiv(tokens, block_tokens), cdiv(layers, block_layers))](
        a.pointers, slots.contiguous(), undo.cos, undo.sin, a.k_scales, a.v_scales, out_k, out_v,
        tokens, layers, *a.strides, *out_k.stride()[:3], *out_v.stride()[:3],
        **a.constants, BT=block_tokens, BL=block_layers,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
