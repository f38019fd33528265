# SPDX-License-Identifier: Apache-2.0
"""What every kernel must compute, in plain fp32 torch, for every packing; same signatures.

Contract of all kernels: slots are int64 ``[tokens]`` and a negative one skips its token; a
destination occurs once; a source may be its own token's destination (in place) but no other
token's.
"""

from __future__ import annotations

import torch

from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.contract import (
    check_deviation,
    check_group,
    check_near,
    check_out,
    check_rotation,
    check_slots,
)
from kvcomm_vllm.kernels.deviation import AnchorSum, Deviation, DistanceSums
from kvcomm_vllm.kernels.pages import PageGroup, Rotation


def turn_keys(k: torch.Tensor, turn: Rotation, interleaved: bool) -> torch.Tensor:
    """``(a + ib) -> (a + ib)(cos + i sin)`` on the leading pairs of k ``[tokens, ..., head_dim]``.

    The pair count comes from the rotation; channels behind the pairs pass through.
    """
    half = turn.cos.shape[-1]
    shape = (len(k), *[1] * (k.ndim - 2), half)
    cos, sin = turn.cos.view(shape), turn.sin.view(shape)
    if interleaved:
        a, b = k[..., 0 : 2 * half : 2], k[..., 1 : 2 * half : 2]
    else:
        a, b = k[..., :half], k[..., half : 2 * half]
    new_a, new_b = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        pairs = torch.stack((new_a, new_b), dim=-1).flatten(-2)
    else:
        pairs = torch.cat((new_a, new_b), dim=-1)
    return torch.cat((pairs, k[..., 2 * half :]), dim=-1)


def _pick(turn: Rotation, keep: torch.Tensor) -> Rotation:
    return Rotation(turn.cos[keep].float(), turn.sin[keep].float())


def load(
    group: PageGroup, src_slots: torch.Tensor, dst_slots: torch.Tensor, turn: Rotation
) -> None:
    """``K[dst] = turn * K[src]``, ``V[dst] = V[src]`` in all layers of the group."""
    check_group(group)
    check_slots(group, src_slots, dst_slots)
    check_rotation(group, turn, len(src_slots))
    keep = (src_slots >= 0) & (dst_slots >= 0)
    turn = _pick(turn, keep)
    for layer in range(len(group.layers)):
        k, v = packing.read(group, layer, src_slots[keep])
        packing.write(group, layer, dst_slots[keep], turn_keys(k, turn, group.interleaved), v)


def deviate(
    deviation: Deviation, layer: int, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dK, dV) of one layer for the tokens ``keep``, unrotated: ``[tokens, heads, head_dim]``."""
    if isinstance(deviation, AnchorSum):
        return _blend(deviation, layer, keep)
    index = deviation.index[keep].long().clamp(max=deviation.mean_k.shape[1] - 1)
    dk, dv = deviation.mean_k[layer, index].float(), deviation.mean_v[layer, index].float()
    if deviation.code is None or deviation.up is None:
        return dk, dv
    code, up = deviation.code[keep, layer].float(), deviation.up[layer].float()
    more_k, more_v = torch.einsum("tr,hrj->thj", code, up).chunk(2, dim=-1)
    return dk + more_k, dv + more_v


def _blend(anchors: AnchorSum, layer: int, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchor by anchor: all of them together would take as often the memory of one layer."""
    rows, dim = anchors.rows[:, keep], anchors.dk.shape[2:]
    dk, dv = rows.new_zeros((2, rows.shape[1], *dim), dtype=torch.float32)
    for a, row in enumerate(rows):
        near, covered = row.clamp(min=0), row >= 0
        for total, arena, weight in ((dk, anchors.dk, anchors.wk), (dv, anchors.dv, anchors.wv)):
            total += (weight[a, keep] * covered)[:, None, None] * arena[near, layer].float()
    return dk, dv


def load_corrected(
    group: PageGroup,
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
    undo: Rotation,
    redo: Rotation,
    deviation: Deviation,
) -> None:
    """``K[dst] = redo * (undo * K[src] + dK)``, ``V[dst] = V[src] + dV``; layers without deviation
    get ``redo * undo * K``. Rounded once."""
    check_group(group)
    check_slots(group, src_slots, dst_slots)
    check_rotation(group, undo, len(src_slots))
    check_rotation(group, redo, len(src_slots))
    check_deviation(group, deviation, len(src_slots))
    keep = (src_slots >= 0) & (dst_slots >= 0)
    undo, redo = _pick(undo, keep), _pick(redo, keep)
    for layer in range(len(group.layers)):
        k, v = packing.read(group, layer, src_slots[keep])
        k = turn_keys(k, undo, group.interleaved)
        if layer >= deviation.skip_layers:
            dk, dv = deviate(deviation, layer - deviation.skip_layers, keep)
            k, v = k + dk, v + dv
        packing.write(group, layer, dst_slots[keep], turn_keys(k, redo, group.interleaved), v)


def collect(
    group: PageGroup,
    slots: torch.Tensor,
    undo: Rotation,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
) -> None:
    """``out_k = undo * K[slots]``, ``out_v = V[slots]``, rounded once.

    Args:
        out_k, out_v: ``[tokens, layers, heads, head_dim]``; rows of negative slots stay as they
            are.
    """
    check_group(group)
    check_slots(group, slots, slots)
    check_rotation(group, undo, len(slots))
    check_out(group, out_k, out_v, len(slots))
    keep = slots >= 0
    undo = _pick(undo, keep)
    for layer in range(len(group.layers)):
        k, v = packing.read(group, layer, slots[keep])
        k = turn_keys(k, undo, group.interleaved)
        out_k[keep, layer], out_v[keep, layer] = k.to(out_k.dtype), v.to(out_v.dtype)


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
        anchor_k, anchor_v: arenas of anchors' base KV ``[arena_rows, layers, heads, head_dim]``.
        rows: int64 ``[anchors, tokens]``, the arena row each token is compared with; negative, or a
            negative slot, contributes zero.
    """
    check_group(group)
    check_slots(group, slots, slots)
    check_rotation(group, undo, len(slots))
    check_near(group, anchor_k, anchor_v, rows, len(slots))
    keep = slots >= 0
    undo = _pick(undo, keep)
    square_v = torch.zeros(len(rows), device=slots.device)
    abs_k, abs_v = torch.zeros((2, *rows.shape), device=slots.device)
    for layer in range(len(group.layers)):
        k, v = packing.read(group, layer, slots[keep])
        k = turn_keys(k, undo, group.interleaved)
        for a, row in enumerate(rows[:, keep]):
            near, covered = row.clamp(min=0), (row >= 0)[:, None, None]
            diff_k = (k - anchor_k[near, layer].float()) * covered
            diff_v = (v - anchor_v[near, layer].float()) * covered
            square_v[a] += diff_v.square().sum()
            abs_k[a, keep] += diff_k.abs().sum((1, 2))
            abs_v[a, keep] += diff_v.abs().sum((1, 2))
    return DistanceSums(square_v, abs_k, abs_v)
