# SPDX-License-Identifier: Apache-2.0
"""The ``residual`` estimator: a mean deviation per token index plus a ridge map from base KV.

With x = the token's features (``features.py``) and d = true minus base KV, unrotated, per layer:

    d(token i of the placeholder) = m_d[i] + (x - m_x[i]) W
    W = argmin |d - m_d - (x - m_x) W|^2 + L

Streaming: it keeps sums, not anchors, so its memory does not grow with the number of anchors. A
rank looks at its own heads alone, so tensor-parallel ranks need no word from each other. W is
stored as two factors of low rank, the first of which gives each token a short *code* per layer:
corrected loads are given the code and multiply it by the second.

To solve for W takes as long as a prefill. It is done a few layers at a time, beside the means and
maps the placeholder has, which all of the new ones replace together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from kvcomm_vllm.config.estimator import EstimatorConfig
from kvcomm_vllm.kernels.deviation import CodeMaps, MeanMap
from kvcomm_vllm.kernels.pages import PageGroup
from kvcomm_vllm.worker import accelerator
from kvcomm_vllm.worker.corrections.base import ErrorSums
from kvcomm_vllm.worker.corrections.features import Features
from kvcomm_vllm.worker.corrections.ridge import (
    about,
    reduced_rank,
    row_means,
    start_directions,
)
from kvcomm_vllm.worker.load import codes_on

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _shapes(
    group: PageGroup, features: Features, skip_layers: int, settings: EstimatorConfig
) -> Shapes:
    """Shape and dtype of all that is kept of one placeholder: its sums, and what they say."""
    layers, heads = len(group.layers) - skip_layers, group.kv_heads
    rows, outputs, width = settings.head_tokens + 1, heads * group.row_dim, features.width
    rank = min(settings.map_rank, outputs, width)
    single = {
        "count": (rows,),
        "factor": (features.raw_width,),
        "offset": (features.inputs,),
        "sum_x": (rows, width),
        "sum_d": (layers, rows, outputs),
        "square": (width, width),
        "cross": (layers, width, outputs),
        # by means alone, and by means beside the map
        "mean_k": (2, rows, layers, heads, group.head_dim),
        "mean_v": (2, rows, layers, heads, group.value_dim),
    }
    shapes: Shapes = {name: (shape, torch.float32) for name, shape in single.items()}
    down, up = _factor_dtypes(group)
    shapes["down"] = ((width, layers, rank), down)
    shapes["up"] = ((layers, heads, rank, group.row_dim), up)
    return shapes


def _factor_dtypes(group: PageGroup) -> tuple[torch.dtype, torch.dtype]:
    """In what codes are computed, and what they are multiplied by: the cache's precision, where
    that is fast.
    """
    cache = group.layers[0]
    if accelerator.accelerated(cache.device):
        fast = cache.dtype if cache.dtype.itemsize > 1 else torch.bfloat16
        return fast, fast
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    # The CPU's kernel rounds the second factor itself.
    return cache.dtype if native and cache.dtype is torch.bfloat16 else torch.float32, torch.float32


def placeholder_bytes(group: PageGroup, skip_layers: int, settings: EstimatorConfig) -> int:
    """Bytes of one placeholder. Nearly all of them are the sums that lead to the map."""
    shapes = _shapes(group, Features(group, settings.map_inputs), skip_layers, settings)
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())


def mean_rows(
    entry: np.ndarray, mapped: np.ndarray, index: np.ndarray, settings: EstimatorConfig
) -> np.ndarray:
    """Where tokens' means lie in every arena: int64 ``[tokens]``, from their placeholders' entries,
    whether a map goes with the mean, and their indices in the placeholder.
    """
    rows = settings.head_tokens + 1
    kind = 2 * entry.astype(np.int64) + mapped
    found: np.ndarray = kind * rows + np.minimum(index, rows - 1)
    return found


_SUMS = frozenset({"count", "factor", "offset", "sum_x", "sum_d", "square", "cross"})


@dataclass
class _Solution:
    """What becomes of a placeholder's sums.

    Attributes:
        entry: whose they are.
        found: its new means and maps, up to ``layer``; named and shaped as those it has.
        mean_x, scale: of the inputs; ``lower``: Cholesky factor of their second moment.
    """

    entry: int
    found: dict[str, torch.Tensor]
    mean_x: torch.Tensor
    scale: torch.Tensor
    lower: torch.Tensor
    layer: int = 0


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
        self.heads, self.split = group.kv_heads, group.split
        self.row_dim = group.row_dim
        self.device = group.layers[0].device
        self._parts = {
            name: torch.zeros(capacity, *shape, dtype=dtype, device=self.device)
            for name, (shape, dtype) in _shapes(group, self.features, skip_layers, settings).items()
        }
        self.layers, _, self.rank, _ = self._parts["up"].shape[1:]
        parts = self._parts
        self._maps = CodeMaps(parts["factor"], parts["offset"], self.features.decays, parts["down"])
        self._start = start_directions(self.heads * self.row_dim, self.rank, self.device)
        self._taught: set[int] = set()
        self._unsolved: int | None = None
        self._solution: _Solution | None = None

    def reset(self, entry: int) -> None:
        """The entry is given to another placeholder."""
        for part in self._parts.values():
            part[entry].zero_()
        self._taught.discard(entry)
        if self._unsolved == entry:
            self._unsolved = self._solution = None

    def codes(self, raw: torch.Tensor, index: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
        """What the maps of their placeholders make of tokens: ``[tokens, layers, rank]`` in the
        first factor's dtype.

        Args:
            raw: ``[tokens, raw_width]``, from ``features.raw``.
            index, entry: int32 ``[tokens]``, each token's index in its placeholder and the entry of
                that; negative = it is corrected by means alone, its code is 0.
        """
        return codes_on(self.device)(raw, self._maps, index, entry)

    def correction(
        self, row: torch.Tensor, entry: torch.Tensor, code: torch.Tensor | None
    ) -> MeanMap:
        """The correction of tokens of any placeholders, by means and map; without their ``code`` by
        means alone.

        Args:
            row: int64 ``[tokens]``, from :func:`mean_rows`; ``entry``: as in :meth:`codes`.
        """
        k, v = (self._parts[name].flatten(0, 2) for name in ("mean_k", "mean_v"))
        if code is None:
            return MeanMap(k, v, row, skip_layers=self.skip_layers)
        return MeanMap(k, v, row, code, self._parts["up"], entry, self.skip_layers)

    def learn(
        self,
        entry: int,
        index: torch.Tensor,
        raw: torch.Tensor,
        deviations: Iterable[torch.Tensor],
        judged_from: int,
    ) -> ErrorSums:
        """Take one more anchor in, layer by layer; what it changes is seen once it is solved.

        Args:
            index: int64 ``[tokens]``, each token's index in the placeholder.
            raw: ``[tokens, raw_width]``, what ``features.raw`` says of the base.
            deviations: per layer true minus base (K, V), fp32 ``[tokens, heads, row_dim]``.
            judged_from: index of the first token whose prediction is judged (those before are
                computed anyway).
        """
        if self.unsolved:  # whoever was to ask for it has forgotten it
            self.solve(self.layers)
        part, row = self._of(entry), index.clamp(max=self.settings.head_tokens)
        if entry not in self._taught:
            self._taught.add(entry)
            for name, value in zip(("factor", "offset"), self.features.spread(raw), strict=True):
                part[name].copy_(value)
        x = self.features.of(raw, part["factor"], part["offset"], index)
        # a weight and no choice: a device would be waited for to say how many there are
        judged = (index >= judged_from)[:, None, None].float()
        down = part["down"].flatten(1)
        code = (x.to(down.dtype) @ down).view(len(x), self.layers, self.rank).float()
        known = part["mean_k"], part["mean_v"]
        left, means, whole = torch.zeros(3, 2, device=index.device)
        for layer, d in enumerate(deviations):
            whole += self._squares(d * judged)
            alone, beside = (
                torch.cat([mean[kind, row, layer] for mean in known], dim=-1) for kind in (0, 1)
            )
            means += self._squares((d - alone) * judged)
            mapped = torch.einsum("tr,hrj->thj", code[:, layer], part["up"][layer].float())
            left += self._squares((d - beside - mapped) * judged)
            part["sum_d"][layer].index_add_(0, row, d.flatten(1))
            part["cross"][layer].addmm_(x.mT, d.flatten(1))
        part["sum_x"].index_add_(0, row, x)
        part["square"].addmm_(x.mT, x)
        part["count"].index_add_(0, row, torch.ones_like(row, dtype=torch.float32))
        self._unsolved = entry
        sums = torch.stack((left, whole, means)).tolist()
        (k_left, v_left), (k_all, v_all), of_means = sums
        return ErrorSums(k_left, k_all, v_left, v_all, *of_means)

    @property
    def unsolved(self) -> bool:
        """Whether :meth:`learn` has taken in what no correction knows of yet."""
        return self._unsolved is not None

    def solve(self, layers: int) -> None:
        """Means and maps of the next ``layers`` layers of what is unsolved. They are used once all
        layers' are there.

        Raises:
            RuntimeError: there is no solution; nothing is unsolved any more.
        """
        assert self._unsolved is not None
        solution, entry = self._solution, self._unsolved
        self._unsolved = self._solution = None
        solution = solution or self._begin(entry)
        stop = min(solution.layer + layers, self.layers)
        for layer in range(solution.layer, stop):
            self._solve_layer(solution, layer)
        solution.layer = stop
        if stop < self.layers:
            self._unsolved, self._solution = entry, solution
            return
        part = self._of(entry)
        for name, found in solution.found.items():
            part[name].copy_(found)

    def warm_up(self) -> None:
        """All of a lesson once: what a device's libraries make at their first call takes longer
        than a lesson does. Nothing may have been learned yet.
        """
        index = torch.zeros(1, dtype=torch.int64, device=self.device)
        raw = torch.zeros(1, self.features.raw_width, device=self.device)
        none = torch.zeros(1, self.heads, self.row_dim, device=self.device)
        self.learn(0, index, raw, [none] * self.layers, judged_from=0)
        self.solve(self.layers)
        self.reset(0)

    def _of(self, entry: int) -> dict[str, torch.Tensor]:
        return {name: part[entry] for name, part in self._parts.items()}

    def _squares(self, d: torch.Tensor) -> torch.Tensor:
        """Of K and of V."""
        return torch.stack([part.square().sum() for part in self.split(d)])

    def _begin(self, entry: int) -> _Solution:
        """What all layers have in common; Cholesky, since the matrix is positive."""
        part = self._of(entry)
        s, count, sum_x = self.settings, part["count"], part["sum_x"]
        tokens = count.sum()
        mean_x = row_means(sum_x, count, s.mean_prior)
        square = part["square"] - about(sum_x, mean_x, sum_x, mean_x, count)
        spread = (square.diagonal() / tokens).clamp(min=0).sqrt()
        scale = 1 / spread.clamp(min=1e-6)
        square = square * scale[:, None] * scale
        square.diagonal().add_(s.ridge * (tokens + s.ridge_tokens))
        lower = torch.linalg.cholesky(square)
        found = {name: torch.empty_like(old) for name, old in part.items() if name not in _SUMS}
        return _Solution(entry, found, mean_x, scale, lower)

    def _solve_layer(self, solution: _Solution, layer: int) -> None:
        part, found = self._of(solution.entry), solution.found
        count, mean_x, scale = part["count"], solution.mean_x, solution.scale
        sum_d = part["sum_d"][layer]
        mean_d = row_means(sum_d, count, self.settings.mean_prior)
        cross = part["cross"][layer] - about(part["sum_x"], mean_x, sum_d, mean_d, count)
        cross = cross * scale[:, None]
        solved = torch.cholesky_solve(cross, solution.lower)
        down, up = reduced_rank(solved, cross, self.rank, self._start)
        found["down"][:, layer] = down * scale[:, None]
        found["up"][layer] = up.view(self.rank, self.heads, -1).transpose(0, 1)
        mapped = mean_x @ found["down"][:, layer].float() @ up  # as it is stored
        for kind, means in enumerate((mean_d, mean_d - mapped)):
            k, v = self.split(means.view(-1, self.heads, self.row_dim))
            found["mean_k"][kind, :, layer], found["mean_v"][kind, :, layer] = k, v
