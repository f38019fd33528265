# SPDX-License-Identifier: Apache-2.0
"""Codes of tokens: features weighted and folded, then through the map of each token's placeholder.

Two launches for tokens of any placeholders. A block goes through the map of each placeholder it has
tokens of, as ``coded.py`` does with its factors.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcomm_vllm.kernels.coded import entry_below
from kvcomm_vllm.kernels.contract import check_maps
from kvcomm_vllm.kernels.deviation import CodeMaps
from kvcomm_vllm.kernels.launch import cdiv

FOLD_TOKENS, FOLD_INPUTS = 8, 128
CODE_TOKENS, CODE_NUMBERS, CODE_INPUTS = 64, 64, 32


@triton.jit(do_not_specialize=["T"])
def fold_kernel(
    p_raw,
    p_factor,
    p_offset,
    p_decays,
    p_index,
    p_entry,
    p_x,
    T,
    RAW: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Program (i_t, i_c): BC of the numbers that the maps are given of BT tokens."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_t = o_t < T
    b_entry = tl.load(p_entry + o_t, mask=m_t, other=-1)
    i_e = tl.maximum(b_entry, 0).to(tl.int64)
    m = (m_t & (b_entry >= 0))[:, None]
    m_in = m & (o_c < INPUTS)[None, :]
    b_x = tl.zeros((BT, BC), tl.float32)
    for first in range(0, RAW, INPUTS):
        m_c = m_in & (first + o_c < RAW)[None, :]
        p_piece = p_raw + (o_t.to(tl.int64) * RAW)[:, None] + (first + o_c)[None, :]
        p_weight = p_factor + (i_e * RAW)[:, None] + (first + o_c)[None, :]
        b_x += tl.load(p_piece, mask=m_c, other=0) * tl.load(p_weight, mask=m_c, other=0)
    b_x -= tl.load(p_offset + (i_e * INPUTS)[:, None] + o_c[None, :], mask=m_in, other=0)
    m_decay = (o_c >= INPUTS) & (o_c < WIDTH)
    b_decay = tl.load(p_decays + (o_c - INPUTS), mask=m_decay, other=1)
    b_index = tl.load(p_index + o_t, mask=m_t, other=0).to(tl.float32)
    b_fading = tl.exp(-b_index[:, None] / b_decay[None, :]) - 1.0
    b_x = tl.where((o_c < INPUTS)[None, :], b_x, b_fading)
    p_to = p_x + (o_t.to(tl.int64) * ROW)[:, None] + o_c[None, :]
    tl.store(p_to, b_x.to(p_x.dtype.element_ty), mask=m & (o_c < WIDTH)[None, :])


@triton.jit(do_not_specialize=["T"])
def code_kernel(
    p_x,
    p_down,
    p_entry,
    p_code,
    T,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Program (i_t, i_n): BN numbers, of any layers, of the codes of BT tokens."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_entry = tl.load(p_entry + o_t, mask=o_t < T, other=-1)
    p_row = p_x + (o_t.to(tl.int64) * ROW)[:, None]
    b_code = tl.zeros((BT, BN), tl.float32)
    i_e = tl.max(b_entry, 0)
    while i_e >= 0:
        p_map = p_down + tl.cast(i_e, tl.int64) * WIDTH * N
        for first in range(0, WIDTH, BK):
            o_k = first + tl.arange(0, BK)
            m_x = (b_entry == i_e)[:, None] & (o_k < WIDTH)[None, :]
            b_x = tl.load(p_row + o_k[None, :], mask=m_x, other=0)
            m_d = (o_k < WIDTH)[:, None] & m_n[None, :]
            b_down = tl.load(p_map + (o_k * N)[:, None] + o_n[None, :], mask=m_d, other=0)
            b_code = tl.dot(b_x, b_down, b_code)
        i_e = entry_below(b_entry, i_e)
    p_to = p_code + (o_t.to(tl.int64) * N)[:, None] + o_n[None, :]
    tl.store(p_to, b_code.to(p_code.dtype.element_ty), mask=(o_t < T)[:, None] & m_n[None, :])


def codes(
    raw: torch.Tensor, maps: CodeMaps, index: torch.Tensor, entry: torch.Tensor
) -> torch.Tensor:
    """What the maps make of tokens: ``[tokens, layers, rank]`` in the dtype of ``down``.

    Args:
        raw: fp32 ``[tokens, raw_width]``, features.
        index, entry: int32 ``[tokens]``: each token's index in its placeholder, and whose map it
            goes through; the code of a token with a negative one is 0.

    Raises:
        ContractError: see :mod:`kvcomm_vllm.kernels.contract`.

    Two launches. Sums are fp32; factors of the product are in the dtype of ``down``.
    """
    check_maps(raw, maps, index, entry)
    down, tokens = maps.down, len(index)
    _, width, layers, rank = down.shape
    code = down.new_empty(tokens, layers, rank)
    numbers = layers * rank
    if not tokens or not numbers:
        return code
    index, entry = index.contiguous(), entry.contiguous()
    row = cdiv(width, 16) * 16  # rows begin where wide accesses may
    x = down.new_empty(tokens, row)
    fold_kernel[(cdiv(tokens, FOLD_TOKENS), cdiv(width, FOLD_INPUTS))](
        raw, maps.factor, maps.offset, maps.decays, index, entry, x, tokens,
        RAW=raw.shape[1], INPUTS=maps.inputs, WIDTH=width, ROW=row,
        BT=FOLD_TOKENS, BC=FOLD_INPUTS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    code_kernel[(cdiv(tokens, CODE_TOKENS), cdiv(numbers, CODE_NUMBERS))](
        x, down, entry, code, tokens,
        WIDTH=width, ROW=row, N=numbers,
        BT=CODE_TOKENS, BN=CODE_NUMBERS, BK=CODE_INPUTS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return code
