# SPDX-License-Identifier: Apache-2.0
"""Mode ``paper``, worker side: an arena of anchors, the gate's distances, and estimated KV.

Messages are compared and corrected by the kernels. The text behind them is plain torch on every
device, layer by layer, so that no more than one layer of a message is held in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.deviation import AnchorSum, DistanceSums
from kvcomm_vllm.kernels.pages import PageGroup
from kvcomm_vllm.kernels.reference import turn_keys
from kvcomm_vllm.messages import (
    AnchorOp,
    AnchorRows,
    EstimateOp,
    LessonOp,
    LoadOp,
    ProbeOp,
    RequestOps,
)
from kvcomm_vllm.worker.checks.kernel_check import check_corrections
from kvcomm_vllm.worker.corrections.base import Ground, shrunk
from kvcomm_vllm.worker.corrections.paper_formulas import (
    channel_distances,
    softmax_weights,
    token_distances,
)
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.load import (
    CorrectKernel,
    DistanceKernel,
    correct_kernel,
    distance_kernel,
    slots_of,
    token_moves,
)
from kvcomm_vllm.worker.upload import upload


class GroupArena:
    """One layer group's part of the arena, K unrotated: ``[rows, layers, kv_heads, row_dim]``.

    Attributes:
        base: base KV of messages; true KV of the text behind them.
        change: true minus base KV of messages, without the first ``skip_layers`` layers.
    """

    def __init__(self, group: LayerGroup, rows: int, skip_layers: int) -> None:
        self.group = group
        self.skip_layers = skip_layers
        layers, dtype = len(group.pages.layers), _arena_dtype(group.pages)
        shape = (rows, group.pages.kv_heads, group.pages.row_dim)
        device = group.pages.layers[0].device
        # layer by layer in memory, as everything here goes through it
        self.base, self.change = (
            torch.zeros((count, *shape), dtype=dtype, device=device).transpose(0, 1)
            for count in (layers, layers - skip_layers)
        )

    def changes(self, rows: torch.Tensor, wk: torch.Tensor, wv: torch.Tensor) -> AnchorSum:
        """The weighted sum of the changes in ``rows``; see :class:`AnchorSum`."""
        dk, dv = self.group.pages.split(self.change)
        return AnchorSum(dk, dv, rows, wk, wv, self.skip_layers)


@dataclass(frozen=True)
class Layer:
    """One layer of an arena, its ``number`` in its group; ``change`` is None for the model's first
    layer, which has no deviation.
    """

    group: LayerGroup
    number: int
    base: torch.Tensor
    change: torch.Tensor | None


class PaperArena:
    """As many rows as the configured memory holds; none with several ranks, since weights need sums
    over all heads.
    """

    def __init__(self, ground: Ground) -> None:
        self.config = config = ground.config
        groups = ground.groups
        self.block_size = ground.block_size
        self.temperature = config.paper.temperature
        # the model's first layer has no deviation: its K and V follow from token and position
        skips = [int(number == 0) for number in range(len(groups))]
        self.row_bytes = sum(
            _row_bytes(group.pages, skip) for group, skip in zip(groups, skips, strict=True)
        )
        self.memory = ground.granted(config.paper.memory_mb)
        self.room = self.memory // self.row_bytes if ground.single else 0
        self.parts = [
            GroupArena(group, self.room, skip) for group, skip in zip(groups, skips, strict=True)
        ]
        pages = [group.pages for group in groups]
        self.device = pages[0].layers[0].device
        # of K and of V of one token
        self.elements = (
            sum(p.kv_heads * p.head_dim * len(p.layers) for p in pages),
            sum(p.kv_heads * p.value_dim * len(p.layers) for p in pages),
        )
        self.distance: DistanceKernel | None = None
        self.correct: CorrectKernel | None = None
        if self.room:
            near = [p.group.pages.split(p.base) for p in self.parts]
            self.distance = distance_kernel(
                [(page, k, v) for page, (k, v) in zip(pages, near, strict=True)]
            )
            self.correct = correct_kernel(self._loads())

    def _loads(self) -> list[tuple[PageGroup, AnchorSum]]:
        return [(part.group.pages, _example(part)) for part in self.parts]

    def check(self) -> None:
        if self.correct is not None:
            check_corrections(self._loads(), self.correct)

    def describe(self) -> str:
        if not self.config.paper.memory_mb:
            return ""
        less = shrunk(self.config.paper.memory_mb, self.memory)
        return f"; mode paper: {less or 'anchors of '}{self.room} tokens"

    def load(self, requests: Sequence[RequestOps]) -> None:
        """Messages and the text behind them, one after another."""
        for ops in requests:
            for op in ops.estimates:
                self.estimate(ops.block_ids, op)

    def distances_of(self, probe: ProbeOp) -> list[list[float]] | None:
        return [self.distances(load, anchors) for load, anchors in probe.spans]

    def learn(self, lesson: LessonOp) -> list[list[float]]:
        """Keep a lesson's messages; there is nothing to judge them by."""
        for op in lesson.anchors:
            self.keep(lesson.block_ids, op)
        return []

    @property
    def unsettled(self) -> bool:
        return False

    def settle(self) -> None:
        """Nothing is put off: anchors are kept as they are."""

    @property
    def layers(self) -> Iterator[Layer]:
        """Every layer of the model, group by group."""
        for part in self.parts:
            changes = (None,) * part.skip_layers + part.change.unbind(1)
            bases = part.base.unbind(1)
            for number, (base, change) in enumerate(zip(bases, changes, strict=True)):
                yield Layer(part.group, number, base, change)

    # ---- the gate --------------------------------------------------------------------------------

    def distances(self, load: LoadOp, anchors: Sequence[AnchorRows]) -> list[float]:
        """``sum (V - V_a)^2`` over everything, one per anchor (paper Eq. 5)."""
        total = sum(part.square_v.double() for part in self._sums(load, anchors))
        assert isinstance(total, torch.Tensor)
        return [float(x) for x in total]

    def _sums(self, load: LoadOp, anchors: Sequence[AnchorRows]) -> Iterator[DistanceSums]:
        """Per layer group, between a message and the first tokens of the anchors."""
        assert self.distance is not None
        slots, positions = self._source(load)
        rows = self._rows(anchors, load.length)
        for part in self.parts:
            near_k, near_v = part.group.pages.split(part.base)
            undo = part.group.rope.undo(positions)
            yield self.distance(part.group.pages, slots, undo, near_k, near_v, rows)

    # ---- estimates -------------------------------------------------------------------------------

    def estimate(self, block_ids: list[int], op: EstimateOp) -> None:
        """Write a message's corrected KV (paper Eq. 6) and that of the text behind it (Eq. 7).

        Weights of Eq. 7 add up to 1 over the anchors that know a token, and the deviation is from
        one base for all: so what is written is the weighted mean of the anchors' own true KV.
        """
        assert self.correct is not None
        moves = token_moves([(block_ids, op.base)], self.block_size, self.device)
        weights = self._token_weights(op)
        rows = self._rows(op.anchors, op.base.length)
        for part in self.parts:
            self.correct(
                part.group.pages,
                moves.source_slots,
                moves.slots,
                part.group.rope.undo(moves.source_positions),
                part.group.rope.redo(moves.positions),
                part.changes(rows, *weights),
            )
        if op.start == op.stop:
            return
        for layer, k, v in self._base(op.base):
            near = self._channel_distances(layer, op, torch.cat((k, v), dim=-1))
            self._write(layer, block_ids, op.start, self._behind(layer, op, near))

    def _token_weights(self, op: EstimateOp) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 ``[anchors, tokens]`` for K and for V, from all layers."""
        sums = list(self._sums(op.base, op.anchors))
        both = (sum(s.abs_k for s in sums), sum(s.abs_v for s in sums))
        wk, wv = (
            softmax_weights(token_distances(torch.as_tensor(part), count), self.temperature)
            for part, count in zip(both, self.elements, strict=True)
        )
        return wk, wv

    def _channel_distances(self, layer: Layer, op: EstimateOp, x: torch.Tensor) -> torch.Tensor:
        """fp32 ``[anchors, kv_heads, row_dim]``: the message against each anchor's last
        tokens.
        """
        squares = []
        for rows in op.anchors:
            end = rows.start + rows.tokens
            near = layer.base[end - op.base.length : end].float()
            squares.append((x - near).square().sum(0))
        return channel_distances(torch.stack(squares))

    def _behind(self, layer: Layer, op: EstimateOp, distances: torch.Tensor) -> torch.Tensor:
        """fp32 ``[stop - start, kv_heads, row_dim]``.

        Each run of tokens is weighted over the anchors that know it: to take weights over all and
        divide by their sum would be 0 / 0 where one that does not is far nearer than the others.
        """
        firsts = [max(op.start, op.behind_end - known) for known in op.known]
        edges = sorted({first for first in firsts if first < op.stop} | {op.stop})
        parts = []
        for start, stop in pairwise(edges):
            knowing = [a for a, first in enumerate(firsts) if first <= start]
            rows = [op.anchors[a].end - (op.behind_end - start) for a in knowing]
            true = torch.stack([layer.base[row : row + stop - start].float() for row in rows])
            weights = softmax_weights(distances[knowing], self.temperature)
            parts.append((weights[:, None] * true).sum(0))
        return torch.cat(parts)

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
            if layer.change is not None:
                change = torch.cat(exact, dim=-1) - found
                layer.change[rows.start : middle] = change.to(layer.change.dtype)
            layer.base[middle : rows.end] = torch.cat(after, dim=-1).to(layer.base.dtype)

    # ---- pages -----------------------------------------------------------------------------------

    def _rows(self, anchors: Sequence[AnchorRows], tokens: int) -> torch.Tensor:
        """Rows of the anchors' first tokens: int64 ``[anchors, tokens]``."""
        first = np.array([rows.start for rows in anchors], dtype=np.int64)
        return upload([first[:, None] + np.arange(tokens)], self.device)[0]

    def _source(self, load: LoadOp) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots and positions of a load's source, int64 ``[tokens]`` each."""
        slots = slots_of(load.source_blocks, load.source_offset, load.length, self.block_size)
        positions = load.source_start + np.arange(load.length, dtype=np.int64)
        there, at = upload([slots, positions], self.device)
        return there, at

    def _base(self, load: LoadOp) -> Iterator[tuple[Layer, torch.Tensor, torch.Tensor]]:
        """Per layer unrotated K and V at a load's source: fp32 ``[tokens, kv_heads, head_dim]``."""
        slots, positions = self._source(load)
        for layer in self.layers:
            pages = layer.group.pages
            k, v = packing.read(pages, layer.number, slots)
            undo = layer.group.rope.undo(positions)
            yield layer, turn_keys(k, undo, pages.interleaved), v

    def _write(self, layer: Layer, block_ids: list[int], start: int, both: torch.Tensor) -> None:
        """``both`` is unrotated K and V ``[tokens, kv_heads, row_dim]``; from ``start`` on."""
        slots = slots_of(block_ids, start, len(both), self.block_size)
        there, positions = upload(
            [slots, start + np.arange(len(both), dtype=np.int64)], self.device
        )
        pages = layer.group.pages
        k, v = pages.split(both)
        turned = turn_keys(k, layer.group.rope.redo(positions), pages.interleaved)
        packing.write(pages, layer.number, there, turned, v)


def _example(part: GroupArena) -> AnchorSum:
    """A correction of one token from one anchor."""
    one = torch.ones(1, 1, device=part.base.device)
    return part.changes(one.long(), one, one)


def _row_bytes(pages: PageGroup, skip_layers: int) -> int:
    """Of one token in one group's arenas."""
    layers = 2 * len(pages.layers) - skip_layers
    return layers * pages.kv_heads * pages.row_dim * _arena_dtype(pages).itemsize


def _arena_dtype(pages: PageGroup) -> torch.dtype:
    """The cache's own dtype, bf16 for fp8."""
    dtype = pages.layers[0].dtype
    return torch.bfloat16 if dtype.itemsize == 1 else dtype
