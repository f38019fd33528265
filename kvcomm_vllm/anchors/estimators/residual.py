# SPDX-License-Identifier: Apache-2.0
"""The ``residual`` estimator: a mean deviation per token index plus a ridge map from base KV.

With x = (K, V) of the base, unrotated, and d = true minus base, per layer and head:

    d(token i of the slot) = m_d[i] + (x - m_x[i]) W        W = argmin |d - m_d - (x - m_x) W|^2 + L

Streaming: it keeps sums, not anchors, so its memory does not grow with the number of anchors. Each
head has a map of its own, so tensor-parallel ranks need no word from each other. W is stored as two
factors of low rank, which lose little and make corrected loads cheap.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kvcomm_vllm.kernels.deviation import MeanMap
from kvcomm_vllm.kernels.pages import PageGroup

_ROUNDS, _SPARE = 4, 8  # of the subspace iteration: loses 0.1% where eigenvalues fall slowly


@dataclass(frozen=True)
class ResidualSettings:
    """Args:
    head_tokens: M, leading tokens of a slot that have a mean of their own.
    mean_prior: anchors' worth by which an index's mean is drawn to the mean of all.
    ridge, ridge_tokens: penalty on the map, ``ridge`` per token seen and for so many more that
        were not, since few tokens say little; inputs are standardised.
    map_rank: rank of the map's two factors; 0, or as much as the map has: whole.
    """

    head_tokens: int
    mean_prior: float
    ridge: float
    ridge_tokens: int
    map_rank: int

    def rank(self, group: PageGroup) -> int:
        """Rank of the factors for this group's heads; 0 = a whole map."""
        return self.map_rank if self.map_rank < 2 * group.head_dim else 0


@dataclass(frozen=True)
class ErrorSums:
    """Squares of K's and V's deviations, and of what was left of them with predictions made before
    they were seen, by means and map and by means alone. Ranks add theirs up.
    """

    k_left: float = 0.0
    k_all: float = 0.0
    v_left: float = 0.0
    v_all: float = 0.0
    k_means: float = 0.0
    v_means: float = 0.0

    def as_list(self) -> list[float]:
        return [self.k_left, self.k_all, self.v_left, self.v_all, self.k_means, self.v_means]


def slot_bytes(group: PageGroup, skip_layers: int, settings: ResidualSettings) -> int:
    """Bytes of one slot: two sums of squares and the map per head, and the tables of means."""
    heads = (len(group.layers) - skip_layers) * group.kv_heads
    width, rank = 2 * group.head_dim, settings.rank(group)
    stored = _map_dtype(group, rank).itemsize * width * (2 * rank if rank else width)
    tables = (settings.head_tokens + 1) * width * (2 * 4 + 2 * 4)
    return heads * (width * width * 2 * 4 + stored + tables + width * (2 * 4 + 4))


def _map_dtype(group: PageGroup, rank: int) -> torch.dtype:
    cache = group.layers[0]
    # The CPU's kernel rounds factors itself, where that is faster; there are few.
    if rank and cache.device.type == "cpu":
        return torch.float32
    return cache.dtype if cache.dtype.itemsize > 1 else torch.bfloat16


class ResidualArena:
    """Sums and solved corrections of all slots, for one layer group; reserved at start.

    Args:
        group: pages whose KV is corrected.
        capacity: number of slots.
        skip_layers: leading layers without deviation (the model's layer 0, whose K and V depend on
            token and position alone).
    """

    def __init__(
        self, group: PageGroup, capacity: int, settings: ResidualSettings, skip_layers: int
    ) -> None:
        self.settings = settings
        self.skip_layers = skip_layers
        layers, heads, dim = len(group.layers) - skip_layers, group.kv_heads, group.head_dim
        self.layers, self.dim = layers, dim
        device = group.layers[0].device
        self.rank = rank = settings.rank(group)
        stored = _map_dtype(group, rank)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(capacity, *shape, dtype=dtype, device=device)

        rows, width = settings.head_tokens + 1, 2 * dim
        self._count = zeros(rows)
        self._origin = zeros(layers, heads, width)
        self._sum_x = zeros(layers, rows, heads, width)
        self._sum_d = zeros(layers, rows, heads, width)
        self._square = zeros(layers, heads, width, width)
        self._cross = zeros(layers, heads, width, width)
        self._mean_k = zeros(layers, rows, heads, dim)
        self._mean_v = zeros(layers, rows, heads, dim)
        self._alone_k = zeros(layers, rows, heads, dim)
        self._alone_v = zeros(layers, rows, heads, dim)
        self._map = zeros(layers, heads, width, rank or width, dtype=stored)
        self._up = zeros(layers, heads, rank, width, dtype=stored)
        self._parts = (
            self._count, self._origin, self._sum_x, self._sum_d, self._square, self._cross,
            self._mean_k, self._mean_v, self._alone_k, self._alone_v, self._map, self._up,
        )  # fmt: skip

    def reset(self, entry: int) -> None:
        """The entry is given to another slot."""
        for part in self._parts:
            part[entry].zero_()

    def deviation(self, entry: int, index: torch.Tensor, mapped: bool = True) -> MeanMap:
        """The correction of one slot for tokens ``index`` (int32 ``[tokens]``) of it; without
        ``mapped`` by the means alone.
        """
        if not mapped:
            alone = self._alone_k[entry], self._alone_v[entry]
            return MeanMap(*alone, index, skip_layers=self.skip_layers)
        return MeanMap(
            mean_k=self._mean_k[entry],
            mean_v=self._mean_v[entry],
            index=index,
            map=self._map[entry],
            x_mean=self._origin[entry],
            skip_layers=self.skip_layers,
            up=self._up[entry] if self.rank else None,
        )

    def learn(
        self,
        entry: int,
        index: torch.Tensor,
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
        judged_from: int,
    ) -> ErrorSums:
        """Take one more anchor in, layer by layer, and solve again.

        Args:
            index: int64 ``[tokens]``, each token's index in the slot.
            pairs: per layer the base (K, V) and its deviation, fp32 ``[tokens, heads, 2 * dim]``.
            judged_from: index of the first token whose prediction is judged (those before are
                computed anyway).
        """
        row = index.clamp(max=self.settings.head_tokens)
        known = bool(self._count[entry].sum() > 0)
        judged = index >= judged_from
        left, means, whole = torch.zeros(3, 2, device=index.device)
        for layer, (x, d) in enumerate(pairs):
            if not known:
                self._origin[entry, layer] = x.mean(0)
            x = x - self._origin[entry, layer]
            rest = d[judged]
            whole += self._squares(rest)
            alone = torch.cat((self._alone_k[entry, layer], self._alone_v[entry, layer]), dim=-1)
            means += self._squares(rest - alone[row[judged]])
            if known:
                rest = rest - self._predict(entry, layer, row[judged], x[judged])
            left += self._squares(rest)
            self._sum_x[entry, layer].index_add_(0, row, x)
            self._sum_d[entry, layer].index_add_(0, row, d)
            by_head = x.transpose(0, 1)
            self._square[entry, layer].baddbmm_(by_head.mT, by_head)
            self._cross[entry, layer].baddbmm_(by_head.mT, d.transpose(0, 1))
        self._count[entry].index_add_(0, row, torch.ones_like(row, dtype=torch.float32))
        for layer in range(self.layers):
            self._solve(entry, layer)
        (k_left, v_left), (k_all, v_all) = left.tolist(), whole.tolist()
        return ErrorSums(k_left, k_all, v_left, v_all, *means.tolist())

    def _squares(self, d: torch.Tensor) -> torch.Tensor:
        squares: torch.Tensor = d.square().unflatten(-1, (2, self.dim))
        return squares.sum((0, 1, 3))

    def _predict(self, entry: int, layer: int, row: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        mean = torch.cat((self._mean_k[entry, layer], self._mean_v[entry, layer]), dim=-1)
        return mean[row] + self._mapped(entry, layer, x)

    def _mapped(self, entry: int, layer: int, x: torch.Tensor) -> torch.Tensor:
        """``x W``, fp32 ``[rows, heads, 2 * dim]``, with W as it is stored."""
        mapped = torch.bmm(x.transpose(0, 1), self._map[entry, layer].float())
        if self.rank:
            mapped = torch.bmm(mapped, self._up[entry, layer].float())
        return mapped.transpose(0, 1)

    def _solve(self, entry: int, layer: int) -> None:
        """Means and map of one layer from its sums; Cholesky, since the matrix is positive."""
        count = self._count[entry]
        tokens, prior = count.sum(), self.settings.mean_prior
        sum_x, sum_d = self._sum_x[entry, layer], self._sum_d[entry, layer]

        def means(sums: torch.Tensor) -> torch.Tensor:
            overall = sums.sum(0) / tokens
            return (sums + prior * overall) / (count + prior)[:, None, None]

        mean_x, mean_d = means(sum_x), means(sum_d)
        square = self._square[entry, layer] - _about(sum_x, mean_x, sum_x, mean_x, count)
        cross = self._cross[entry, layer] - _about(sum_x, mean_x, sum_d, mean_d, count)
        spread = (square.diagonal(dim1=-2, dim2=-1) / tokens).clamp(min=0).sqrt()
        scale = 1 / spread.clamp(min=1e-6)
        square = square * scale[:, :, None] * scale[:, None, :]
        square.diagonal(dim1=-2, dim2=-1).add_(
            self.settings.ridge * (tokens + self.settings.ridge_tokens)
        )
        cross = cross * scale[:, :, None]
        solved = torch.cholesky_solve(cross, torch.linalg.cholesky(square))
        if self.rank:
            solved, up = reduced_rank(solved, cross, self.rank)
            self._up[entry, layer] = up.to(self._up.dtype)
        self._map[entry, layer] = (solved * scale[:, :, None]).to(self._map.dtype)
        self._alone_k[entry, layer] = mean_d[..., : self.dim]
        self._alone_v[entry, layer] = mean_d[..., self.dim :]
        mean = mean_d - self._mapped(entry, layer, mean_x)
        self._mean_k[entry, layer] = mean[..., : self.dim]
        self._mean_v[entry, layer] = mean[..., self.dim :]


def reduced_rank(
    solved: torch.Tensor, cross: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors ``[heads, channels, rank]`` and ``[heads, rank, channels]`` of the map of this rank
    that predicts most like W = ``solved`` = S^-1 ``cross``, S the inputs' second moment with its
    penalty (reduced-rank ridge regression).

    What a direction v of the output contributes is |L^T W v|^2 = v^T W^T cross v with S = L L^T, so
    the largest eigenvectors V of that matrix are kept: W V V^T. They are found by subspace
    iteration from a fixed start: for few of them that takes a sixth of a full decomposition.
    """
    explained = torch.bmm(solved.mT, cross)
    width = explained.shape[-1]
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(width, min(width, rank + _SPARE), generator=draw).to(explained)
    basis = start.expand(len(explained), -1, -1)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(torch.bmm(explained, basis)).Q
    inner = torch.bmm(basis.mT, torch.bmm(explained, basis))
    kept = torch.bmm(basis, torch.linalg.eigh(inner).eigenvectors[..., -rank:])
    return torch.bmm(solved, kept), kept.mT


def _about(
    sum_a: torch.Tensor,
    mean_a: torch.Tensor,
    sum_b: torch.Tensor,
    mean_b: torch.Tensor,
    count: torch.Tensor,
) -> torch.Tensor:
    """What moving both factors of ``sum a b^T`` to their means takes off: ``[heads, A, B]`` from
    ``[rows, heads, channels]``. Holds for any means, also for shrunk ones.
    """
    a, b = sum_a.transpose(0, 1), sum_b.transpose(0, 1)
    m_a, m_b = mean_a.transpose(0, 1), mean_b.transpose(0, 1)
    return torch.bmm(a.mT, m_b) + torch.bmm(m_a.mT, b - count[None, :, None] * m_b)
