# SPDX-License-Identifier: Apache-2.0
"""Anchors, worker side: arenas of what placeholders have learned, corrected loads, and lessons."""

from __future__ import annotations

from collections.abc import Sequence as Listing

import torch

from kvcomm_vllm.kernels.deviation import MeanMap
from kvcomm_vllm.messages import LessonOp, LoadOp, ProbeOp, RequestOps
from kvcomm_vllm.worker.corrections.base import ErrorSums, Ground
from kvcomm_vllm.worker.corrections.deviations import base_of, deviations, true_of
from kvcomm_vllm.worker.corrections.residual import (
    ResidualArena,
    placeholder_bytes,
)
from kvcomm_vllm.worker.load import (
    CorrectKernel,
    TokenMoves,
    correct_kernel,
    placeholder_indices,
    token_moves,
)


class Anchors:
    """What placeholders have learned, and loads corrected with it.

    One arena per layer group, for as many placeholders as the configured memory holds; none where
    not even one fits, or where the mode asks for none, or where a forward of one engine alone would
    hang (data parallelism).
    """

    def __init__(self, ground: Ground) -> None:
        self.config = config = ground.config
        self.groups = groups = ground.groups
        self.block_size = ground.block_size
        self.device = groups[0].pages.layers[0].device
        self.judged_from = config.anchor_seam_tokens
        # the model's first layer has no deviation: its K and V follow from token and position
        skips = [int(number == 0) for number in range(len(groups))]
        pages = [group.pages for group in groups]
        self.bytes_per_placeholder = sum(
            placeholder_bytes(group, skip, config.estimator)
            for group, skip in zip(pages, skips, strict=True)
        )
        wanted = config.mode == "anchor" and ground.alone and ground.memory
        memory = config.anchor_memory_mb * 2**20 if wanted else 0
        self.room = min(memory // self.bytes_per_placeholder, config.max_placeholders)
        self.arenas: list[ResidualArena] = []
        self.kernel: CorrectKernel | None = None
        if self.room:
            self.arenas = [
                ResidualArena(group, self.room, config.estimator, skip)
                for group, skip in zip(pages, skips, strict=True)
            ]
            self.kernel = correct_kernel(
                [
                    (group, example)
                    for group, arena in zip(pages, self.arenas, strict=True)
                    for example in _examples(arena)
                ]
            )

    def describe(self) -> str:
        if self.config.mode != "anchor":
            return ""
        each = self.bytes_per_placeholder / 2**20
        return f"; anchors of {self.room} placeholders of {each:.1f} MB each"

    def load(self, requests: Listing[RequestOps]) -> None:
        """The loads of warm placeholders, one at a time."""
        kinds: dict[tuple[int, bool], list[tuple[list[int], LoadOp]]] = {}
        for ops in requests:
            for load in ops.loads:
                if load.entry >= 0:
                    kinds.setdefault((load.entry, load.mapped), []).append((ops.block_ids, load))
        for (entry, mapped), pairs in kinds.items():
            moves = token_moves(pairs, self.block_size, self.device)
            self._load(entry, mapped, placeholder_indices(pairs, self.device), moves)

    def distances_of(self, probe: ProbeOp) -> list[list[float]] | None:
        return None

    def _load(self, entry: int, mapped: bool, index: torch.Tensor, moves: TokenMoves) -> None:
        """Load tokens ``index`` (int32 ``[tokens]``) of one placeholder with its correction."""
        assert self.kernel is not None
        for group, arena in zip(self.groups, self.arenas, strict=True):
            undo = group.rope.undo(moves.source_positions)
            code = None
            if mapped:
                raw = arena.features.raw(moves.source_slots, undo)
                code = arena.code(entry, index, raw)
            self.kernel(
                group.pages,
                moves.source_slots,
                moves.slots,
                undo,
                group.rope.redo(moves.positions),
                arena.deviation(entry, index, code),
            )

    def learn(self, op: LessonOp) -> list[list[float]]:
        """Take the deviations of a lesson's spans in; per span the error sums of this rank."""
        for entry in op.fresh:
            for arena in self.arenas:
                arena.reset(entry)
        return [self._learn(op.block_ids, span) for span in op.spans]

    def _learn(self, block_ids: list[int], span: LoadOp) -> list[float]:
        tokens = torch.arange(span.length, device=self.device)
        total = ErrorSums().as_list()
        for group, arena in zip(self.groups, self.arenas, strict=True):
            base = base_of(group, span, self.block_size)
            true = true_of(group, span, block_ids, self.block_size)
            sums = arena.learn(
                span.entry,
                (span.placeholder_index + tokens).clamp(min=0),
                arena.features.raw(base.slots, base.undo),
                deviations(group, base, true, arena.skip_layers),
                self.judged_from,
            )
            total = [a + b for a, b in zip(total, sums.as_list(), strict=True)]
        return total


def _examples(arena: ResidualArena) -> list[MeanMap]:
    """One correction of each kind, of one token."""
    index = torch.zeros(1, dtype=torch.int32, device=arena.device)
    raw = torch.zeros(1, arena.features.raw_width, device=arena.device)
    codes = (None, arena.code(0, index, raw))
    return [arena.deviation(0, index, code) for code in codes]
