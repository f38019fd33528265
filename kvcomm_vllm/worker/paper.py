# SPDX-License-Identifier: Apache-2.0
"""Mode ``paper``, worker side: an arena of anchors, the gate's distances, and estimated KV.

Plain torch on every device, layer by layer, so that no more than one layer of a message is held in
fp32: this mode is there to be compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from kvcomm_vllm.anchors.estimators.paper import (
    channel_distances,
    softmax_weights,
    token_distances,
)
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.reference import turn_keys
from kvcomm_vllm.messages import AnchorOp, AnchorRows, EstimateOp, LoadOp
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.load import slots_of


@dataclass(frozen=True)
class Layer:
    """One layer's part of the arena: ``[rows, kv_heads, 2 * head_dim]`` each, K unrotated.

    Args:
        base: base KV of messages; true KV of the text behind them.
        change: true minus base KV of messages.
        first: the model's first layer, which has no deviation.
    """

    group: LayerGroup
    number: int
    base: torch.Tensor
    change: torch.Tensor
    first: bool


class PaperArena:
    """As many rows as the configured memory holds; none where this mode cannot work.

    Args:
        allowed: False with several ranks: weights need sums over all heads.
    """

    def __init__(
        self, groups: list[LayerGroup], config: KVCommConfig, block_size: int, allowed: bool
    ) -> None:
        self.block_size = block_size
        self.temperature = config.paper_temperature
        pages = [group.pages for group in groups]
        self.device = pages[0].layers[0].device
        sizes = [2 * p.kv_heads * p.head_dim * len(p.layers) for p in pages]
        dtypes = [_arena_dtype(p.layers[0].dtype) for p in pages]
        self.row_bytes = sum(2 * n * d.itemsize for n, d in zip(sizes, dtypes, strict=True))
        self.rows = config.paper_memory_mb * 2**20 // self.row_bytes if allowed else 0
        self.elements = sum(sizes) // 2  # of K, or of V, of one token
        self.layers: list[Layer] = []
        for group, dtype in zip(groups, dtypes, strict=True):
            p = group.pages
            for number in range(len(p.layers)):
                shape = (self.rows, p.kv_heads, 2 * p.head_dim)
                base, change = (
                    torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2)
                )
                self.layers.append(Layer(group, number, base, change, first=not self.layers))

    # ---- the gate --------------------------------------------------------------------------------

    def distances(self, load: LoadOp, anchors: Sequence[AnchorRows]) -> list[float]:
        """``sum (V - V_a)^2`` over everything, one per anchor (paper Eq. 5)."""
        total = torch.zeros(len(anchors), dtype=torch.float64)
        for layer, _, v in self._base(load):
            dim = layer.group.pages.head_dim
            for a, rows in enumerate(anchors):
                near = layer.base[rows.start : rows.start + load.length, :, dim:]
                total[a] += float((v - near.float()).square().sum())
        return [float(x) for x in total]

    # ---- estimates -------------------------------------------------------------------------------

    def estimate(self, block_ids: list[int], op: EstimateOp) -> None:
        """Write a message's corrected KV (paper Eq. 6) and that of the text behind it (Eq. 7).

        Weights of Eq. 7 add up to 1 over the anchors that know a token, and the deviation is from
        one base for all: so what is written is the weighted mean of the anchors' own true KV.
        """
        weight_k, weight_v = self._token_weights(op)
        place = op.base.prompt_start
        for layer, k, v in self._base(op.base):
            dim = layer.group.pages.head_dim
            per_channel = self._channel_distances(layer, op, torch.cat((k, v), dim=-1))
            if not layer.first:
                for a, rows in enumerate(op.anchors):
                    change = layer.change[rows.start : rows.start + op.base.length].float()
                    k = k + weight_k[a, :, None, None] * change[..., :dim]
                    v = v + weight_v[a, :, None, None] * change[..., dim:]
            self._write(layer, block_ids, place, k, v)
            if op.start < op.stop:
                both = self._behind(layer, op, per_channel)
                self._write(layer, block_ids, op.start, both[..., :dim], both[..., dim:])

    def _token_weights(self, op: EstimateOp) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 ``[anchors, tokens]`` for K and for V, from all layers."""
        sums = torch.zeros(2, len(op.anchors), op.base.length, device=self.device)
        for layer, k, v in self._base(op.base):
            dim = layer.group.pages.head_dim
            for a, rows in enumerate(op.anchors):
                near = layer.base[rows.start : rows.start + op.base.length].float()
                sums[0, a] += (k - near[..., :dim]).abs().sum((1, 2))
                sums[1, a] += (v - near[..., dim:]).abs().sum((1, 2))
        weights = [
            softmax_weights(token_distances(part, self.elements), self.temperature) for part in sums
        ]
        return weights[0], weights[1]

    def _channel_distances(self, layer: Layer, op: EstimateOp, x: torch.Tensor) -> torch.Tensor:
        """fp32 ``[anchors, kv_heads, 2 * head_dim]``: the message against each anchor's last
        tokens.
        """
        squares = []
        for rows in op.anchors:
            end = rows.start + rows.tokens
            near = layer.base[end - op.base.length : end].float()
            squares.append((x - near).square().sum(0))
        return channel_distances(torch.stack(squares))

    def _behind(self, layer: Layer, op: EstimateOp, distances: torch.Tensor) -> torch.Tensor:
        """fp32 ``[stop - start, kv_heads, 2 * head_dim]``.

        Each run of tokens is weighted over the anchors that know it: to take weights over all and
        divide by their sum would be 0 / 0 where one that does not is far nearer than the others.
        """
        firsts = [max(op.start, op.behind_end - known) for known in op.known]
        edges = sorted({first for first in firsts if first < op.stop} | {op.stop})
        runs = []
        for start, stop in pairwise(edges):
            knowing = [a for a, first in enumerate(firsts) if first <= start]
            rows = [op.anchors[a].end - (op.behind_end - start) for a in knowing]
            true = torch.stack([layer.base[row : row + stop - start].float() for row in rows])
            weights = softmax_weights(distances[knowing], self.temperature)
            runs.append((weights[:, None] * true).sum(0))
        return torch.cat(runs)

    # ---- learning --------------------------------------------------------------------------------

    def keep(self, block_ids: list[int], op: AnchorOp) -> None:
        """Take in an anchor; the true KV of its message and of the text behind it lies in
        ``block_ids``.
        """
        rows = op.rows
        middle = rows.start + rows.tokens
        true = LoadOp(block_ids, op.base.prompt_start, op.base.prompt_start, 0, rows.tokens)
        start = op.base.prompt_start + rows.tokens
        behind = LoadOp(block_ids, start, start, 0, rows.behind)
        parts = zip(self._base(op.base), self._base(true), self._base(behind), strict=True)
        for (layer, *base), (_, *exact), (_, *after) in parts:
            found = torch.cat(base, dim=-1)
            layer.base[rows.start : middle] = found.to(layer.base.dtype)
            change = torch.cat(exact, dim=-1) - found
            layer.change[rows.start : middle] = change.to(layer.change.dtype)
            layer.base[middle : rows.end] = torch.cat(after, dim=-1).to(layer.base.dtype)

    # ---- pages -----------------------------------------------------------------------------------

    def _base(self, load: LoadOp) -> Iterator[tuple[Layer, torch.Tensor, torch.Tensor]]:
        """Per layer unrotated K and V at a load's source: fp32 ``[tokens, kv_heads, head_dim]``."""
        slots = slots_of(load.source_blocks, load.source_offset, load.length, self.block_size)
        places = torch.from_numpy(slots).to(self.device)
        positions = load.source_start + torch.arange(load.length, device=self.device)
        for layer in self.layers:
            pages = layer.group.pages
            k, v = packing.read(pages, layer.number, places)
            undo = layer.group.rope.undo(positions)
            yield layer, turn_keys(k, undo, pages.interleaved), v

    def _write(
        self, layer: Layer, block_ids: list[int], start: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Unrotated K and V to the positions from ``start``."""
        slots = slots_of(block_ids, start, len(k), self.block_size)
        positions = start + torch.arange(len(k), device=self.device)
        pages = layer.group.pages
        turned = turn_keys(k, layer.group.rope.redo(positions), pages.interleaved)
        packing.write(pages, layer.number, torch.from_numpy(slots).to(self.device), turned, v)


def _arena_dtype(dtype: torch.dtype) -> torch.dtype:
    """The cache's own dtype, bf16 for fp8."""
    return torch.bfloat16 if dtype.itemsize == 1 else dtype
