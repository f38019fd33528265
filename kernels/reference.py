# SPDX-License-Identifier: Apache-2.0
"""What every kernel must compute, in plain fp32 torch, for every packing; same signatures.

Contract of all kernels: slots are int64 ``[tokens]`` and a negative one skips its token; a
destination occurs once; a source may be its own token's destination (in place) but no other
token's.
"""

from __future__ import annotations

from functools import partial

import torch

from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.contract import (
    check_deviation,
    check_group,
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


def rotate(group: PageGroup, slots: torch.Tensor, turn: Rotation) -> None:
    """``K[slots] = turn * K[slots]`` in place in all layers; V is not touched."""
    check_group(group)
    check_slots(group, slots, slots)
    check_rotation(group, turn, len(slots))
    keep = slots >= 0
    turn = _pick(turn, keep)
    for layer in range(len(group.layers)):
        k, v = packing.read(group, layer, slots[keep])
        packing.write(group, layer, slots[keep], turn_keys(k, turn, group.interleaved), v)


def deviate(
    deviation: Deviation, layer: int, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dK, dV) of one layer for the tokens ``keep``, unrotated: ``[tokens, heads, head_dim]``."""
    if isinstance(deviation, AnchorSum):
        rows = deviation.rows[:, keep]
        covered = (rows >= 0)[..., None, None]

        def blend(arena: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            d = arena[rows.clamp(min=0), layer].float() * covered
            w = weights[:, None, layer] if weights.ndim == 4 else weights[:, keep, None, None]
            return (w.float() * d).sum(0)

        return blend(deviation.dk, deviation.wk), blend(deviation.dv, deviation.wv)
    index = deviation.index[keep].long().clamp(max=deviation.mean_k.shape[1] - 1)
    dk, dv = deviation.mean_k[layer, index].float(), deviation.mean_v[layer, index].float()
    if deviation.code is None or deviation.up is None:
        return dk, dv
    code, up = deviation.code[keep, layer].float(), deviation.up[layer].float()
    more_k, more_v = torch.einsum("tr,hrj->thj", code, up).chunk(2, dim=-1)
    return dk + more_k, dv + more_v


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
    base_k: torch.Tensor | None,
    base_v: torch.Tensor | None,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
    *,
    skip_layers: int = 0,
) -> None:
    """``out_k = undo * K[slots] - base_k``, ``out_v = V[slots] - base_v``, rounded once.

    Args:
        base_k, base_v: base KV, unrotated, ``[tokens, layers - skip_layers, heads, head_dim]``, any
            strides and float dtype; None = zero, which stores the unrotated KV itself.
        out_k, out_v: rows of an arena, same shape; rows of negative slots stay as they are.
    """
    check_group(group)
    check_slots(group, slots, slots)
    check_rotation(group, undo, len(slots))
    keep = slots >= 0
    undo = _pick(undo, keep)
    for layer in range(skip_layers, len(group.layers)):
        k, v = packing.read(group, layer, slots[keep])
        k, at = turn_keys(k, undo, group.interleaved), layer - skip_layers
        if base_k is not None and base_v is not None:
            k, v = k - base_k[keep, at].float(), v - base_v[keep, at].float()
        out_k[keep, at], out_v[keep, at] = k.to(out_k.dtype), v.to(out_v.dtype)


def distance(
    group: PageGroup,
    slots: torch.Tensor,
    undo: Rotation,
    anchor_k: torch.Tensor,
    anchor_v: torch.Tensor,
    rows: torch.Tensor,
    *,
    per_channel: bool = False,
) -> DistanceSums:
    """Sums of differences between the span at ``slots`` and A anchors, in the unrotated frame.

    Args:
        anchor_k, anchor_v: arenas of anchors' base KV ``[arena_rows, layers, heads, head_dim]``.
        rows: int64 ``[anchors, tokens]``, the arena row each token is compared with; negative, or a
            negative slot, contributes zero.
        per_channel: also compute the sums over tokens per (layer, head, channel).
    """
    check_group(group)
    check_slots(group, slots, slots)
    check_rotation(group, undo, len(slots))
    anchors, tokens = rows.shape
    layers, heads, dim = len(group.layers), group.kv_heads, group.head_dim
    keep = slots >= 0
    undo = _pick(undo, keep)
    new = partial(torch.zeros, device=slots.device)
    square_v, abs_k, abs_v = new(anchors), new((anchors, tokens)), new((anchors, tokens))
    channel_k, channel_v = (new((anchors, layers, heads, dim)) for _ in range(2))
    covered = (rows[:, keep] >= 0)[..., None, None]
    for layer in range(layers):
        k, v = packing.read(group, layer, slots[keep])
        k = turn_keys(k, undo, group.interleaved)
        near = rows[:, keep].clamp(min=0)
        diff_k = (k - anchor_k[near, layer].float()) * covered
        diff_v = (v - anchor_v[near, layer].float()) * covered
        square_v += diff_v.square().sum((1, 2, 3))
        abs_k[:, keep] += diff_k.abs().sum((2, 3))
        abs_v[:, keep] += diff_v.abs().sum((2, 3))
        channel_k[:, layer], channel_v[:, layer] = diff_k.square().sum(1), diff_v.square().sum(1)
    if not per_channel:
        return DistanceSums(square_v, abs_k, abs_v)
    return DistanceSums(square_v, abs_k, abs_v, channel_k, channel_v)
