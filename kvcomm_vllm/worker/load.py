# SPDX-License-Identifier: Apache-2.0
"""Load: all REUSE spans of a step, from their source pages to the requests' own, re-rotated.

K_new = R(new) (R(-old) K_page + dK)      V_new = V_page + dV      dK = dV = 0 for cold placeholders
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvcomm_vllm import compat
from kvcomm_vllm.kernels.deviation import Deviation, DistanceSums
from kvcomm_vllm.kernels.pages import PageGroup, Rotation
from kvcomm_vllm.messages import LoadOp
from kvcomm_vllm.worker.kv_view import LayerGroup

LoadKernel = Callable[[PageGroup, torch.Tensor, torch.Tensor, Rotation], None]
CorrectKernel = Callable[
    [PageGroup, torch.Tensor, torch.Tensor, Rotation, Rotation, Deviation], None
]
DistanceKernel = Callable[
    [PageGroup, torch.Tensor, Rotation, torch.Tensor, torch.Tensor, torch.Tensor], DistanceSums
]


def load_kernel(device: torch.device) -> LoadKernel:
    """The fastest load this machine has: Triton on accelerators, numba on CPU, plain torch where
    numba is missing.
    """
    if device.type != "cpu":
        from kvcomm_vllm.kernels import load as triton_load

        return triton_load.load
    from kvcomm_vllm.kernels.cpu import load as cpu_load

    if cpu_load.available():
        compat.let_vllm_scan_llvmlite()
    return cpu_load.load


def correct_kernel(examples: Sequence[tuple[PageGroup, Deviation]]) -> CorrectKernel:
    """The same for corrected loads; compiled here for these groups and kinds of deviation, not in
    the first request.
    """
    if examples[0][0].layers[0].device.type != "cpu":
        from kvcomm_vllm.kernels import correct

        return correct.load_corrected
    from kvcomm_vllm.kernels.cpu import correct as cpu_correct

    for group, example in examples:
        cpu_correct.warm_up(group, example)
    return cpu_correct.load_corrected


def distance_kernel(examples: Sequence[tuple[PageGroup, torch.dtype]]) -> DistanceKernel:
    """The same for distances to anchors, in arenas of these dtypes."""
    if examples[0][0].layers[0].device.type != "cpu":
        from kvcomm_vllm.kernels import distance

        return distance.distance
    from kvcomm_vllm.kernels.cpu import distance as cpu_distance

    for group, arena in examples:
        cpu_distance.warm_up(group, arena)
    return cpu_distance.distance


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


def token_moves(
    ops: Iterable[tuple[list[int], LoadOp]], block_size: int, device: torch.device
) -> TokenMoves:
    """Lists every token of pairs (the request's block table, one of its loads)."""
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for block_ids, op in ops:
        span = np.arange(op.length, dtype=np.int64)
        columns[0].append(slots_of(op.source_blocks, op.source_offset, op.length, block_size))
        columns[1].append(slots_of(block_ids, op.prompt_start, op.length, block_size))
        columns[2].append(op.source_start + span)
        columns[3].append(op.prompt_start + span)
    tensors = [torch.from_numpy(np.concatenate(c)).to(device, non_blocking=True) for c in columns]
    return TokenMoves(*tensors)


def placeholder_indices(
    ops: Iterable[tuple[list[int], LoadOp]], device: torch.device
) -> torch.Tensor:
    """Each token's index in its placeholder, in :func:`token_moves`' order: int32 ``[tokens]``."""
    firsts = ((op.placeholder_index, op.length) for _, op in ops)
    parts = [np.arange(first, first + length, dtype=np.int32) for first, length in firsts]
    index = np.maximum(np.concatenate(parts), 0)
    return torch.from_numpy(index).to(device, non_blocking=True)


def run_loads(groups: list[LayerGroup], moves: TokenMoves, kernel: LoadKernel) -> None:
    """One launch per layer group."""
    for group in groups:
        turn = group.rope.move(moves.source_positions, moves.positions)
        kernel(group.pages, moves.source_slots, moves.slots, turn)
