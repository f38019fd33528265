# SPDX-License-Identifier: Apache-2.0
"""Loading KV on the CPU: from packed page to packed page in one compiled pass.

Same signatures and contract as ``reference``. What the compiled kernels do not cover (fp8 caches,
other packings, no numba) goes through ``portable``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from kvcomm_vllm.kernels.contract import check_group, check_rotation, check_slots
from kvcomm_vllm.kernels.cpu import portable, tables
from kvcomm_vllm.kernels.cpu.runs import Cut, Ints, Tokens, split
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@cache
def available() -> bool:
    """True if kernels can be compiled on this machine (numba is there and its vectors work)."""
    try:
        from kvcomm_vllm.kernels.cpu.lanes import probe
    except ImportError:
        return False
    try:
        return probe()
    except Exception:  # an LLVM that refuses these vectors is no reason to stop serving
        return False


def supports(group: PageGroup) -> bool:
    """True if a compiled kernel serves this group; the others work too, only slower."""
    first = group.layers[0]
    if first.device.type != "cpu" or first.dtype not in KINDS or not available():
        return False
    if group.packing is Packing.AMX:
        # NeoX partners (j, j + half) share a row of two channels only if half is even.
        whole_rows = group.interleaved or group.rotary_dim % 4 == 0
        return first.dtype is torch.bfloat16 and whole_rows
    return group.packing is Packing.VEC and _value_bytes(group) % 4 == 0


def _kernel(group: PageGroup) -> Any:
    from kvcomm_vllm.kernels.cpu.load_kernels import load_kernel

    adjacent = group.packing is Packing.AMX and group.interleaved
    return load_kernel(KINDS[group.layers[0].dtype], group.packing, adjacent)


def warm_up(group: PageGroup) -> None:
    """Compile what ``load`` needs for this group (seconds), so that no request waits for it."""
    if supports(group):
        _kernel(group)


def load(
    group: PageGroup, src_slots: torch.Tensor, dst_slots: torch.Tensor, turn: Rotation
) -> None:
    """``K[dst] = turn * K[src]``, ``V[dst] = V[src]`` in all layers of the group.

    Args:
        src_slots, dst_slots: int64 ``[tokens]``; a token with a negative slot is skipped.
        turn: fp32 ``[tokens, rotary_dim / 2]``; fp32 inside, rounded once to the cache's dtype.

    Raises:
        ContractError: slots outside the cache, or a source that is another token's destination.
    """
    if not supports(group):
        portable.load(group, src_slots, dst_slots, turn)
        return
    check_group(group)
    check_slots(group, src_slots, dst_slots)
    check_rotation(group, turn, len(src_slots))
    tokens = split(src_slots, dst_slots, group.tokens_per_page)
    if len(tokens.index):
        move(group, tokens, turn)


def move(
    group: PageGroup,
    tokens: Tokens,
    turn: Rotation,
    tiled: tuple[Cut, Ints] | None = None,
) -> None:
    """``load`` without its checks, for a supported group and at least one token.

    Args:
        tiled: see ``tables.build``.
    """
    from kvcomm_vllm.kernels.cpu.load_kernels import JOB
    from kvcomm_vllm.kernels.cpu.threads import run, share

    made = tables.build(group, tokens, turn, tiled)
    bases = np.array([layer.data_ptr() for layer in group.layers], dtype=np.int64)
    groups, layers, value_bytes = len(made.block_bounds) - 1, len(bases), _value_bytes(group)
    step = share(groups, layers)
    run(
        _kernel(group),
        JOB,
        groups * -(-layers // step),
        work_bytes=4 * layers * len(tokens.index) * group.kv_heads * value_bytes,
        bases=bases.ctypes.data,
        layers=layers,
        layer_step=step,
        groups=groups,
        blocks=made.blocks.ctypes.data,
        block_count=len(made.blocks),
        block_bounds=made.block_bounds.ctypes.data,
        values=made.values.ctypes.data,
        value_count=len(made.values),
        value_bounds=made.value_bounds.ctypes.data,
        value_rows=group.head_dim // 16,
        value_row_bytes=group.tokens_per_page // 2 * tables.LINE,
        factors=made.factors.ctypes.data,
        stream=tables.all_aligned(group) and value_bytes % tables.LINE == 0,
        **tables.head_rows(group),
    )


def _value_bytes(group: PageGroup) -> int:
    return group.head_dim * group.layers[0].itemsize
