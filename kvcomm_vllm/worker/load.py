# SPDX-License-Identifier: Apache-2.0
"""Load: all REUSE spans of a step, from their source pages to the requests' own, re-rotated.

K_new = R(new) (R(-old) K_page + dK)      V_new = V_page + dV      dK = dV = 0 for cold placeholders
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvcomm_vllm.compat.device import let_vllm_scan_llvmlite
from kvcomm_vllm.kernels.deviation import CodeMaps, Deviation, DistanceSums
from kvcomm_vllm.kernels.pages import PageGroup, Rotation
from kvcomm_vllm.kv_groups import NOTHING
from kvcomm_vllm.messages import LoadOp, RequestOps
from kvcomm_vllm.worker import accelerator
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.rope import Rope
from kvcomm_vllm.worker.upload import upload

Pairs = list[tuple[list[int], LoadOp]]
LoadKernel = Callable[[PageGroup, torch.Tensor, torch.Tensor, Rotation], None]
CorrectKernel = Callable[
    [PageGroup, torch.Tensor, torch.Tensor, Rotation, Rotation, Deviation], None
]
DistanceKernel = Callable[
    [PageGroup, torch.Tensor, Rotation, torch.Tensor, torch.Tensor, torch.Tensor], DistanceSums
]
CodesKernel = Callable[[torch.Tensor, CodeMaps, torch.Tensor, torch.Tensor], torch.Tensor]


def load_kernel(device: torch.device) -> LoadKernel:
    """The fastest load this machine has: Triton on accelerators, numba on CPU, plain torch where
    numba is missing.
    """
    if accelerator.accelerated(device):
        from kvcomm_vllm.kernels import load as triton_load

        return triton_load.load
    from kvcomm_vllm.kernels.cpu import load as cpu_load

    if cpu_load.available():
        let_vllm_scan_llvmlite()
    return cpu_load.load


def correct_kernel(examples: Sequence[tuple[PageGroup, Deviation]]) -> CorrectKernel:
    """The same for corrected loads; compiled here for these groups and kinds of deviation, each of
    one token, not in the first request.
    """
    if accelerator.accelerated(examples[0][0].layers[0].device):
        from kvcomm_vllm.kernels import correct

        for group, example in examples:
            nowhere, turn = _nothing(group)
            correct.load_corrected(group, nowhere, nowhere, turn, turn, example)
        return correct.load_corrected
    from kvcomm_vllm.kernels.cpu import correct as cpu_correct

    for group, example in examples:
        cpu_correct.warm_up(group, example)
    return cpu_correct.load_corrected


def distance_kernel(
    examples: Sequence[tuple[PageGroup, torch.Tensor, torch.Tensor]],
) -> DistanceKernel:
    """The same for distances to anchors, in these arenas of K and V."""
    if accelerator.accelerated(examples[0][0].layers[0].device):
        from kvcomm_vllm.kernels import distance

        for group, near_k, near_v in examples:
            nowhere, turn = _nothing(group)
            distance.distance(group, nowhere, turn, near_k, near_v, nowhere[None])
        return distance.distance
    from kvcomm_vllm.kernels.cpu import distance as cpu_distance

    for group, near_k, _ in examples:
        cpu_distance.warm_up(group, near_k.dtype)
    return cpu_distance.distance


def _nothing(group: PageGroup) -> tuple[torch.Tensor, Rotation]:
    """One token that lies nowhere, so that nothing is read or written; and a turn for it."""
    device = group.layers[0].device
    turn = torch.zeros(1, group.rotary_dim // 2, device=device)
    return torch.full((1,), -1, device=device), Rotation(turn, turn)


def warm_up_loads(groups: list[LayerGroup], kernel: LoadKernel) -> None:
    """Compile what plain loads need, and place its tables, before a request waits for it."""
    for group in groups:
        if accelerator.accelerated(group.pages.layers[0].device):
            nowhere, _ = _nothing(group.pages)
            first = torch.zeros_like(nowhere)
            run_loads([group], TokenMoves(nowhere, nowhere, first, first), kernel)
        else:
            from kvcomm_vllm.kernels.cpu import load as cpu_load

            cpu_load.warm_up(group.pages)


def codes_on(device: torch.device) -> CodesKernel:
    """The same for codes of tokens; torch on the CPU."""
    if accelerator.accelerated(device):
        from kvcomm_vllm.kernels import codes

        return codes.codes
    from kvcomm_vllm.kernels import reference

    return reference.codes


def turn_to(rope: Rope, old: torch.Tensor, new: torch.Tensor) -> Rotation:
    """What moves keys from positions ``old`` to ``new`` (int64 ``[tokens]``); one launch."""
    if accelerator.accelerated(old.device):
        from kvcomm_vllm.kernels import turns

        return turns.move(rope.cos, rope.sin, old, new)
    return rope.move(old, new)


def turns_of(rope: Rope, old: torch.Tensor, new: torch.Tensor) -> tuple[Rotation, Rotation]:
    """The same in two parts, between which a correction is added: off the old positions, and to the
    new ones; one launch.
    """
    if accelerator.accelerated(old.device):
        from kvcomm_vllm.kernels import turns

        return turns.apart(rope.cos, rope.sin, old, new)
    return rope.undo(old), rope.redo(new)


@dataclass(frozen=True)
class TokenMoves:
    """The tokens of a step's loads: slots and positions, int64 ``[tokens]`` on the cache's
    device.
    """

    source_slots: torch.Tensor
    slots: torch.Tensor
    source_positions: torch.Tensor
    positions: torch.Tensor


def slots_of(block_ids: list[int], start: int, count: int, block_size: int) -> np.ndarray:
    """Slots of ``count`` tokens from the ``start``-th of the run of pages ``block_ids``: int64
    ``[count]``.
    """
    token = np.arange(start, start + count, dtype=np.int64)
    return (
        np.asarray(block_ids, dtype=np.int64)[token // block_size] * block_size + token % block_size
    )


def move_columns(ops: Iterable[tuple[list[int], LoadOp]], block_size: int) -> list[np.ndarray]:
    """The four lists of :class:`TokenMoves`, of every token of pairs (the request's block table,
    one of its loads).
    """
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for block_ids, op in ops:
        span = np.arange(op.length, dtype=np.int64)
        source = slots_of(op.source_blocks, op.source_offset, op.length, block_size)
        target = slots_of(block_ids, op.prompt_start, op.length, block_size)
        four = [source, target, op.source_start + span, op.prompt_start + span]
        if op.windowed:  # of windowed layers not all is read, or has a place
            there = (source // block_size != NOTHING) & (target // block_size != NOTHING)
            four = [column[there] for column in four]
        for column, part in zip(columns, four, strict=True):
            column.append(part)
    return [np.concatenate(column) for column in columns]


def token_moves(
    ops: Iterable[tuple[list[int], LoadOp]], block_size: int, device: torch.device
) -> TokenMoves:
    """The same on the device, in one transfer."""
    return TokenMoves(*upload(move_columns(ops, block_size), device))


def in_group(pairs: Iterable[tuple[RequestOps, LoadOp]], group: int) -> Pairs:
    """For :func:`move_columns`: in one of vLLM's KV cache groups, the block table of each load's
    request, and the load as its pages lie there.
    """
    found: Pairs = []
    for ops, load in pairs:
        table = ops.windowed.get(group)
        if table is None:
            found.append((ops.block_ids, load))
        else:
            found.append((table.pages, replace(load, source_blocks=load.windowed[group])))
    return found


def placeholder_indices(ops: Iterable[tuple[list[int], LoadOp]]) -> np.ndarray:
    """Each token's index in its placeholder, in :func:`move_columns`' order: int32 ``[tokens]``."""
    firsts = ((op.placeholder_index, op.length) for _, op in ops)
    parts = [np.arange(first, first + length, dtype=np.int32) for first, length in firsts]
    return np.maximum(np.concatenate(parts), 0)


def run_loads(groups: list[LayerGroup], moves: TokenMoves, kernel: LoadKernel) -> None:
    """One launch per layer group."""
    for group in groups:
        turn = turn_to(group.rope, moves.source_positions, moves.positions)
        kernel(group.pages, moves.source_slots, moves.slots, turn)
