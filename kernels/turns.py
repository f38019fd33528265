# SPDX-License-Identifier: Apache-2.0
"""Turns: the factors that move keys from one position to another, out of a rotary table."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcomm_vllm.kernels.contract import require
from kvcomm_vllm.kernels.launch import cdiv, next_power
from kvcomm_vllm.kernels.pages import Rotation

BLOCK = 2048  # numbers of a program's block


@triton.jit(do_not_specialize=["T"])
def turns_kernel(
    p_cos,
    p_sin,
    p_old,
    p_new,
    p_undo_cos,
    p_undo_sin,
    p_redo_cos,
    p_redo_sin,
    T,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    JOINED: tl.constexpr,
    BT: tl.constexpr,
):
    """Program i_t: BT tokens. JOINED: both turns in one, written to the first outputs."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_c = tl.arange(0, HALF_P)
    m_t = o_t < T
    m = m_t[:, None] & (o_c < HALF)[None, :]
    o_old = (tl.load(p_old + o_t, mask=m_t, other=0) * HALF)[:, None] + o_c[None, :]
    o_new = (tl.load(p_new + o_t, mask=m_t, other=0) * HALF)[:, None] + o_c[None, :]
    b_cos = tl.load(p_cos + o_old, mask=m, other=1)
    b_sin = tl.load(p_sin + o_old, mask=m, other=0)
    b_square = b_cos * b_cos + b_sin * b_sin
    b_cos, b_sin = b_cos / b_square, -b_sin / b_square
    b_redo_cos = tl.load(p_cos + o_new, mask=m, other=1)
    b_redo_sin = tl.load(p_sin + o_new, mask=m, other=0)
    o_out = (o_t.to(tl.int64) * HALF)[:, None] + o_c[None, :]
    if JOINED:
        b_both = b_cos * b_redo_cos - b_sin * b_redo_sin
        b_sin = b_sin * b_redo_cos + b_cos * b_redo_sin
        b_cos = b_both
    else:
        tl.store(p_redo_cos + o_out, b_redo_cos, mask=m)
        tl.store(p_redo_sin + o_out, b_redo_sin, mask=m)
    tl.store(p_undo_cos + o_out, b_cos, mask=m)
    tl.store(p_undo_sin + o_out, b_sin, mask=m)


def move(cos: torch.Tensor, sin: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> Rotation:
    """What takes keys from positions ``old`` to ``new``; one launch.

    Args:
        cos, sin: fp32 ``[positions, rotary_dim / 2]``, the table; old, new: int64 ``[tokens]``.

    Raises:
        ContractError: the table or the positions are of another form.
    """
    made = _empty(cos, old)
    _launch(cos, sin, old, new, made, made, joined=True)
    return made


def apart(
    cos: torch.Tensor, sin: torch.Tensor, old: torch.Tensor, new: torch.Tensor
) -> tuple[Rotation, Rotation]:
    """What takes the rotation of ``old`` off, and what puts that of ``new`` on; one launch.

    Arguments and errors as those of :func:`move`.
    """
    undo, redo = _empty(cos, old), _empty(cos, old)
    _launch(cos, sin, old, new, undo, redo, joined=False)
    return undo, redo


def _empty(cos: torch.Tensor, positions: torch.Tensor) -> Rotation:
    shape = (len(positions), cos.shape[1])
    return Rotation(cos.new_empty(shape), cos.new_empty(shape))


def _launch(
    cos: torch.Tensor,
    sin: torch.Tensor,
    old: torch.Tensor,
    new: torch.Tensor,
    undo: Rotation,
    redo: Rotation,
    *,
    joined: bool,
) -> None:
    for table in (cos, sin):
        require(
            table.dtype == torch.float32 and table.is_contiguous() and table.shape == cos.shape,
            f"a rotary table is contiguous fp32 [positions, pairs], got {table.dtype}",
        )
    for positions in (old, new):
        require(
            positions.dtype == torch.int64 and positions.shape == old.shape and old.ndim == 1,
            f"positions are int64 [tokens], got {positions.dtype} {list(positions.shape)}",
        )
    tokens, half = len(old), cos.shape[1]
    if not tokens or not half:
        return
    block = max(1, BLOCK // next_power(half))
    turns_kernel[(cdiv(tokens, block),)](
        cos, sin, old.contiguous(), new.contiguous(),
        undo.cos, undo.sin, redo.cos, redo.sin, tokens,
        HALF=half, HALF_P=next_power(half), JOINED=joined, BT=block,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
