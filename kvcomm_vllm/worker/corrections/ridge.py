# SPDX-License-Identifier: Apache-2.0
"""Means per row and reduced-rank ridge regression, from sums over tokens alone."""

from __future__ import annotations

import torch

_ROUNDS, _SPARE = 4, 8  # of the subspace iteration: loses 0.1% where eigenvalues fall slowly


def row_means(sums: torch.Tensor, count: torch.Tensor, prior: float) -> torch.Tensor:
    """Mean of each row, drawn to the mean of all by ``prior`` tokens' worth: like ``sums``.

    Args:
        sums: ``[rows, channels]``; ``count``: tokens of each row ``[rows]``, not all zero.
    """
    overall = sums.sum(0) / count.sum()
    return (sums + prior * overall) / (count + prior)[:, None]


def about(
    sum_a: torch.Tensor,
    mean_a: torch.Tensor,
    sum_b: torch.Tensor,
    mean_b: torch.Tensor,
    count: torch.Tensor,
) -> torch.Tensor:
    """What moving both factors of ``sum a b^T`` to their rows' means takes off: ``[A, B]`` from
    ``[rows, channels]``. Holds for any means, also for shrunk ones.
    """
    return sum_a.mT @ mean_b + mean_a.mT @ (sum_b - count[:, None] * mean_b)


def start_directions(outputs: int, rank: int, device: torch.device) -> torch.Tensor:
    """Where :func:`reduced_rank` starts: ``[outputs, rank and some]``, the same in every run."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(outputs, min(outputs, rank + _SPARE), generator=draw).to(device)


def reduced_rank(
    solved: torch.Tensor, cross: torch.Tensor, rank: int, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors ``[inputs, rank]`` and ``[rank, outputs]`` of the map of this rank that predicts most
    like W = ``solved`` = S^-1 ``cross``, S the inputs' second moment with its penalty.

    What a direction v of the output contributes is |L^T W v|^2 = v^T W^T cross v with S = L L^T, so
    the largest eigenvectors V of that matrix are kept: W V V^T. They are found by subspace
    iteration from a fixed ``start``, which never forms the matrix.
    """
    basis = start

    def explained(directions: torch.Tensor) -> torch.Tensor:
        return solved.mT @ (cross @ directions)

    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(explained(basis)).Q
    inner = basis.mT @ explained(basis)
    kept = basis @ torch.linalg.eigh(inner).eigenvectors[:, -rank:]
    return solved @ kept, kept.mT
