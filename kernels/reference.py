# SPDX-License-Identifier: Apache-2.0
"""What every kernel must compute, in plain fp32 torch, for every packing; same signatures.

Contract of all kernels: slots are int64 ``[tokens]`` and a negative one skips its token; a
destination occurs once; a source may be its own token's destination (in place) but no other
token's.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.contract import (
    check_deviation,
    check_group,
    check_maps,
    check_near,
    check_out,
    check_read,
    check_rotation,
    check_slots,
)
from kvcomm_vllm.kernels.deviation import AnchorSum, CodeMaps, Deviation, DistanceSums
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
    """(dK, dV) of one layer for the tokens ``keep``, unrotated: ``[tokens, heads, head_dim]`` and
    ``[tokens, heads, value_dim]``.
    """
    if isinstance(deviation, AnchorSum):
        return _blend(deviation, layer, keep)
    row = deviation.row[keep]
    dk, dv = deviation.mean_k[row, layer].float(), deviation.mean_v[row, layer].float()
    if deviation.code is None or deviation.up is None or deviation.entry is None:
        return dk, dv
    code, entry = deviation.code[keep, layer].float(), deviation.entry[keep]
    for number in entry.unique().tolist():
        if number >= 0:
            mine, up = entry == number, deviation.up[number, layer].float()
            more = torch.einsum("tr,hrj->thj", code[mine], up)
            dk[mine] += more[..., : dk.shape[-1]]
            dv[mine] += more[..., dk.shape[-1] :]
    return dk, dv


def _blend(anchors: AnchorSum, layer: int, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchor by anchor: all of them together would take as often the memory of one layer."""
    rows = anchors.rows[:, keep]
    dk, dv = (
        rows.new_zeros((rows.shape[1], *arena.shape[2:]), dtype=torch.float32)
        for arena in (anchors.dk, anchors.dv)
    )
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
        out_k, out_v: ``[tokens, layers, heads, head_dim]``, V with ``value_dim``; rows of negative
            slots stay as they are.
    """
    check_group(group)
    check_read(group, slots)
    check_rotation(group, undo, len(slots))
    check_out(group, out_k, out_v, len(slots))
    keep = slots >= 0
    undo = _pick(undo, keep)
    for layer in range(len(group.layers)):
        k, v = packing.read(group, layer, slots[keep])
        k = turn_keys(k, undo, group.interleaved)
        out_k[keep, layer], out_v[keep, layer] = k.to(out_k.dtype), v.to(out_v.dtype)


def fold(raw: torch.Tensor, factor: torch.Tensor, inputs: int) -> torch.Tensor:
    """Features ``[tokens, raw_width]`` times ``factor`` ``[raw_width]``, those that lie ``inputs``
    apart added up: fp32 ``[tokens, inputs]``.
    """
    folded = torch.zeros(len(raw), inputs, device=raw.device)
    for piece, weights in zip(raw.split(inputs, dim=1), factor.split(inputs), strict=True):
        folded[:, : len(weights)].addcmul_(piece, weights)
    return folded


def inputs_of(
    raw: torch.Tensor,
    factor: torch.Tensor,
    offset: torch.Tensor,
    decays: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """What a map is given of tokens: fp32 ``[tokens, inputs + decays]``; see :class:`CodeMaps`."""
    fading = torch.expm1(-index[:, None] / decays)
    return torch.cat((fold(raw, factor, len(offset)) - offset, fading), dim=-1)


def codes(
    raw: torch.Tensor, maps: CodeMaps, index: torch.Tensor, entry: torch.Tensor
) -> torch.Tensor:
    """What the maps make of tokens: ``[tokens, layers, rank]`` in the dtype of ``down``.

    Args:
        raw: fp32 ``[tokens, raw_width]``, features.
        index, entry: int32 ``[tokens]``: each token's index in its placeholder, and whose map it
            goes through; the code of a token with a negative one is 0.
    """
    check_maps(raw, maps, index, entry)
    found = maps.down.new_zeros(len(index), *maps.down.shape[2:])
    # run by run, which copies nothing where tokens of one entry follow each other
    edges = (entry.diff() != 0).nonzero().flatten() + 1
    for start, stop in pairwise([0, *edges.tolist(), len(index)]):
        number = int(entry[start]) if start < stop else -1
        if number >= 0:
            factor, offset = maps.factor[number], maps.offset[number]
            run, at = raw[start:stop], index[start:stop]
            x = inputs_of(run, factor, offset, maps.decays, at).to(maps.down.dtype)
            found[start:stop] = (x @ maps.down[number].flatten(1)).view_as(found[start:stop])
    return found


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
