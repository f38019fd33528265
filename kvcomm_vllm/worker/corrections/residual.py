# SPDX-License-Identifier: Apache-2.0
"""The ``residual`` estimator: a mean deviation per token index plus a ridge map from base KV.

With x = the token's features (``features.py``) and d = true minus base KV, unrotated, per layer:

    d(token i of the placeholder) = m_d[i] + (x - m_x[i]) W
    W = argmin |d - m_d - (x - m_x) W|^2 + L

Streaming: it keeps sums, not anchors, so its memory does not grow with the number of anchors. A
rank looks at its own heads alone, so tensor-parallel ranks need no word from each other. W is
stored as two factors of low rank, the first of which gives each token a short *code* per layer:
corrected loads are given the code and multiply it by the second.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kvcomm_vllm.config.estimator import EstimatorConfig
from kvcomm_vllm.kernels.deviation import MeanMap
from kvcomm_vllm.kernels.pages import PageGroup
from kvcomm_vllm.kernels.reference import deviate
from kvcomm_vllm.worker.corrections.base import ErrorSums
from kvcomm_vllm.worker.corrections.features import Features
from kvcomm_vllm.worker.corrections.ridge import about, reduced_rank, row_means

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _shapes(
    group: PageGroup, features: Features, skip_layers: int, settings: EstimatorConfig
) -> Shapes:
    """Shape and dtype of all that is kept of one placeholder: its sums, and what they say."""
    layers, heads, dim = len(group.layers) - skip_layers, group.kv_heads, group.head_dim
    rows, outputs, width = settings.head_tokens + 1, heads * 2 * dim, features.width
    rank = min(settings.map_rank, outputs, width)
    single = {
        "count": (rows,),
        "factor": (features.raw_width,),
        "offset": (features.inputs,),
        "sum_x": (rows, width),
        "sum_d": (layers, rows, outputs),
        "square": (width, width),
        "cross": (layers, width, outputs),
        "mean_k": (layers, rows, heads, dim),
        "mean_v": (layers, rows, heads, dim),
        "alone_k": (layers, rows, heads, dim),
        "alone_v": (layers, rows, heads, dim),
    }
    shapes: Shapes = {name: (shape, torch.float32) for name, shape in single.items()}
    down, up = _factor_dtypes(group)
    shapes["down"] = ((width, layers, rank), down)
    shapes["up"] = ((layers, heads, rank, 2 * dim), up)
    return shapes


def _factor_dtypes(group: PageGroup) -> tuple[torch.dtype, torch.dtype]:
    """In what codes are computed, and what they are multiplied by: the cache's precision, where
    that is fast.
    """
    cache = group.layers[0]
    if cache.device.type != "cpu":
        fast = cache.dtype if cache.dtype.itemsize > 1 else torch.bfloat16
        return fast, fast
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    # The CPU's kernel rounds the second factor itself.
    return cache.dtype if native and cache.dtype is torch.bfloat16 else torch.float32, torch.float32


def placeholder_bytes(group: PageGroup, skip_layers: int, settings: EstimatorConfig) -> int:
    """Bytes of one placeholder. Nearly all of them are the sums that lead to the map."""
    shapes = _shapes(group, Features(group, settings.map_inputs), skip_layers, settings)
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())


class ResidualArena:
    """Sums and solved corrections of all placeholders, for one layer group; reserved at start.

    Args:
        group: pages whose KV is corrected.
        capacity: number of placeholders.
        skip_layers: leading layers without deviation (the model's layer 0, whose K and V depend on
            token and position alone).
    """

    def __init__(
        self, group: PageGroup, capacity: int, settings: EstimatorConfig, skip_layers: int
    ) -> None:
        self.settings = settings
        self.skip_layers = skip_layers
        self.features = Features(group, settings.map_inputs)
        self.heads, self.dim = group.kv_heads, group.head_dim
        self.device = group.layers[0].device
        self._parts = {
            name: torch.zeros(capacity, *shape, dtype=dtype, device=self.device)
            for name, (shape, dtype) in _shapes(group, self.features, skip_layers, settings).items()
        }
        self.layers, _, self.rank, _ = self._parts["up"].shape[1:]

    def reset(self, entry: int) -> None:
        """The entry is given to another placeholder."""
        for part in self._parts.values():
            part[entry].zero_()

    def code(self, entry: int, index: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        """What the map makes of tokens: ``[tokens, layers, rank]`` in the first factor's dtype.

        Args:
            index: ``[tokens]``, each token's index in the placeholder.
            raw: ``[tokens, raw_width]``, from ``features.raw``.
        """
        part = self._of(entry)
        return self._code(part, self.features.of(raw, part["factor"], part["offset"], index))

    def deviation(self, entry: int, index: torch.Tensor, code: torch.Tensor | None) -> MeanMap:
        """The correction of one placeholder for its tokens ``index`` (int32 ``[tokens]``), by means
        and map; without their ``code`` by the means alone.
        """
        part = self._of(entry)
        if code is None:
            alone = part["alone_k"], part["alone_v"]
            return MeanMap(*alone, index, skip_layers=self.skip_layers)
        means = part["mean_k"], part["mean_v"]
        return MeanMap(*means, index, code, part["up"], skip_layers=self.skip_layers)

    def learn(
        self,
        entry: int,
        index: torch.Tensor,
        raw: torch.Tensor,
        deviations: Iterable[torch.Tensor],
        judged_from: int,
    ) -> ErrorSums:
        """Take one more anchor in, layer by layer, and solve again.

        Args:
            index: int64 ``[tokens]``, each token's index in the placeholder.
            raw: ``[tokens, raw_width]``, what ``features.raw`` says of the base.
            deviations: per layer true minus base (K, V), fp32 ``[tokens, heads, 2 * dim]``.
            judged_from: index of the first token whose prediction is judged (those before are
                computed anyway).
        """
        part, row = self._of(entry), index.clamp(max=self.settings.head_tokens)
        if not bool(part["count"].any()):
            for name, value in zip(("factor", "offset"), self.features.spread(raw), strict=True):
                part[name].copy_(value)
        x = self.features.of(raw, part["factor"], part["offset"], index)
        judged = index >= judged_from
        both = self.deviation(entry, index, self._code(part, x))
        alone = self.deviation(entry, index, None)
        left, means, whole = torch.zeros(3, 2, device=index.device)
        for layer, d in enumerate(deviations):
            rest = d[judged]
            whole += self._squares(rest)
            means += self._squares(rest - torch.cat(deviate(alone, layer, judged), dim=-1))
            left += self._squares(rest - torch.cat(deviate(both, layer, judged), dim=-1))
            part["sum_d"][layer].index_add_(0, row, d.flatten(1))
            part["cross"][layer].addmm_(x.mT, d.flatten(1))
        part["sum_x"].index_add_(0, row, x)
        part["square"].addmm_(x.mT, x)
        part["count"].index_add_(0, row, torch.ones_like(row, dtype=torch.float32))
        self._solve(part)
        (k_left, v_left), (k_all, v_all) = left.tolist(), whole.tolist()
        return ErrorSums(k_left, k_all, v_left, v_all, *means.tolist())

    def _of(self, entry: int) -> dict[str, torch.Tensor]:
        return {name: part[entry] for name, part in self._parts.items()}

    def _code(self, part: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        down = part["down"].flatten(1)
        return (x.to(down.dtype) @ down).view(len(x), self.layers, self.rank)

    def _squares(self, d: torch.Tensor) -> torch.Tensor:
        squares: torch.Tensor = d.square().unflatten(-1, (2, self.dim))
        return squares.sum((0, 1, 3))

    def _solve(self, part: dict[str, torch.Tensor]) -> None:
        """Means and maps of all layers from their sums; Cholesky, since the matrix is positive."""
        s, count, sum_x = self.settings, part["count"], part["sum_x"]
        tokens = count.sum()
        mean_x = row_means(sum_x, count, s.mean_prior)
        square = part["square"] - about(sum_x, mean_x, sum_x, mean_x, count)
        spread = (square.diagonal() / tokens).clamp(min=0).sqrt()
        scale = 1 / spread.clamp(min=1e-6)
        square = square * scale[:, None] * scale
        square.diagonal().add_(s.ridge * (tokens + s.ridge_tokens))
        lower = torch.linalg.cholesky(square)
        for layer in range(self.layers):
            sum_d = part["sum_d"][layer]
            mean_d = row_means(sum_d, count, s.mean_prior)
            cross = part["cross"][layer] - about(sum_x, mean_x, sum_d, mean_d, count)
            cross = cross * scale[:, None]
            down, up = reduced_rank(torch.cholesky_solve(cross, lower), cross, self.rank)
            part["down"][:, layer] = down * scale[:, None]
            part["up"][layer] = up.view(self.rank, self.heads, -1).transpose(0, 1)
            self._put(part, "alone", layer, mean_d)
            mapped = mean_x @ part["down"][:, layer].float() @ up  # as it is stored
            self._put(part, "mean", layer, mean_d - mapped)

    def _put(
        self, part: dict[str, torch.Tensor], name: str, layer: int, means: torch.Tensor
    ) -> None:
        k, v = means.view(-1, self.heads, 2, self.dim).unbind(2)
        part[f"{name}_k"][layer], part[f"{name}_v"][layer] = k, v
