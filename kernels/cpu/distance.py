# SPDX-License-Identifier: Apache-2.0
"""Distances to anchors on the CPU: same signature and contract as ``reference.distance``."""

from __future__ import annotations

from typing import Any

import torch

from kvcomm_vllm.kernels import reference
from kvcomm_vllm.kernels.contract import check_group, check_near, check_rotation, check_slots
from kvcomm_vllm.kernels.cpu import tables
from kvcomm_vllm.kernels.cpu.correct import supports
from kvcomm_vllm.kernels.cpu.load import KINDS
from kvcomm_vllm.kernels.cpu.runs import split
from kvcomm_vllm.kernels.cpu.tile_job import TileJob
from kvcomm_vllm.kernels.deviation import DistanceSums
from kvcomm_vllm.kernels.pages import PageGroup, Rotation


def _kernel(group: PageGroup, arena: torch.dtype) -> Any:
    from kvcomm_vllm.kernels.cpu.distance_kernel import distance_kernel

    return distance_kernel(KINDS[group.layers[0].dtype], KINDS[arena])


def warm_up(group: PageGroup, arena: torch.dtype) -> None:
    """Compile what ``distance`` needs for this group and an arena of this dtype (seconds)."""
    if supports(group):
        _kernel(group, arena)


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
        slots: int64 ``[tokens]``; a negative one contributes zero.
        undo: fp32 ``[tokens, rotary_dim / 2]``.
        anchor_k, anchor_v: arenas of anchors' base KV ``[arena_rows, layers, heads, head_dim]``.
        rows: int64 ``[anchors, tokens]``, the arena row each token is compared with; negative =
            none.

    Raises:
        ContractError: slots outside the cache, rows outside the arena.
    """
    if not supports(group):
        return reference.distance(group, slots, undo, anchor_k, anchor_v, rows)
    check_group(group)
    check_slots(group, slots, slots)
    check_rotation(group, undo, len(slots))
    check_near(group, anchor_k, anchor_v, rows, len(slots))
    tokens, anchors = split(slots, slots, group.tokens_per_page), len(rows)
    abs_k, abs_v = torch.zeros(2, anchors, len(slots))
    if not len(tokens.index) or not anchors:
        return DistanceSums(torch.zeros(anchors), abs_k, abs_v)
    from kvcomm_vllm.kernels.cpu.distance_kernel import JOB
    from kvcomm_vllm.kernels.cpu.threads import run

    tiles = TileJob(group, tokens, tables.vec_tiles(group, tokens), undo)
    sums = torch.zeros(len(tiles.index), anchors, 3, 16)
    row, layer, head, _ = (stride * anchor_k.itemsize for stride in anchor_k.stride())
    tiles.job |= {
        "anchor_k": anchor_k.data_ptr(),
        "anchor_v": anchor_v.data_ptr(),
        "row_stride": row,
        "layer_stride": layer,
        "head_stride": head,
        "anchor_rows": tiles.keep(rows.numpy()[:, tiles.index]),
        "anchors": anchors,
        "sums": sums.data_ptr(),
    }
    work_bytes = anchors * tiles.work_bytes
    kernel = _kernel(group, anchor_k.dtype)
    run(kernel, JOB, tiles.job["block_count"], work_bytes=work_bytes, **tiles.job)
    sum_k, sum_v, square = sums.sum(-1).permute(2, 1, 0)
    index = torch.from_numpy(tiles.index)
    abs_k[:, index], abs_v[:, index] = sum_k, sum_v
    return DistanceSums(square.sum(1), abs_k, abs_v)
