# SPDX-License-Identifier: Apache-2.0
"""Anchors, worker side: arenas of what placeholders have learned, corrected loads, and lessons."""

from __future__ import annotations

from collections.abc import Sequence as Listing

import numpy as np
import torch

from kvcomm_vllm.kernels.deviation import MeanMap
from kvcomm_vllm.kernels.pages import PageGroup
from kvcomm_vllm.messages import LessonOp, LoadOp, ProbeOp, RequestOps
from kvcomm_vllm.worker import accelerator
from kvcomm_vllm.worker.checks.kernel_check import check_corrections
from kvcomm_vllm.worker.corrections.base import ErrorSums, Ground, shrunk
from kvcomm_vllm.worker.corrections.deviations import base_of, deviations, true_of
from kvcomm_vllm.worker.corrections.residual import (
    ResidualArena,
    mean_rows,
    placeholder_bytes,
)
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.load import (
    CorrectKernel,
    TokenMoves,
    correct_kernel,
    move_columns,
    placeholder_indices,
    turns_of,
)
from kvcomm_vllm.worker.upload import upload

CHUNK_TOKENS = 1024  # what is made of a token on the way takes up to 50 KB, of so many at a time

# Learned in one idle step. On a device each of them waits for its own linear algebra.
SETTLED_LAYERS = 2


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
        wanted = config.mode == "anchor" and ground.alone
        self.memory = ground.granted(config.anchor_memory_mb)
        most = min(self.memory // self.bytes_per_placeholder, config.max_placeholders)
        self.room = most if wanted else 0
        self.arenas: list[ResidualArena] = []
        self.kernel: CorrectKernel | None = None
        if self.room:
            self.arenas = [
                ResidualArena(group, self.room, config.estimator, skip)
                for group, skip in zip(pages, skips, strict=True)
            ]
            if accelerator.accelerated(self.device):
                for arena in self.arenas:
                    arena.warm_up()
            self.kernel = correct_kernel(self._loads())

    def _loads(self) -> list[tuple[PageGroup, MeanMap]]:
        """One of each kind."""
        return [
            (group.pages, example)
            for group, arena in zip(self.groups, self.arenas, strict=True)
            for example in _examples(group, arena)
        ]

    def check(self) -> None:
        if self.kernel is not None:
            check_corrections(self._loads(), self.kernel)

    def describe(self) -> str:
        if self.config.mode != "anchor":
            return ""
        each = self.bytes_per_placeholder / 2**20
        less = shrunk(self.config.anchor_memory_mb, self.memory) or "anchors of "
        return f"; {less}{self.room} placeholders of {each:.1f} MB each"

    def load(self, requests: Listing[RequestOps]) -> None:
        """The loads of all warm placeholders together."""
        pairs = [(ops.block_ids, load) for ops in requests for load in ops.loads if load.entry >= 0]
        if not pairs:
            return
        # tokens that go through the same map follow each other
        pairs.sort(key=lambda pair: (pair[1].mapped, pair[1].entry))
        lengths = [load.length for _, load in pairs]
        entry = np.repeat(np.array([load.entry for _, load in pairs], dtype=np.int32), lengths)
        mapped = np.repeat(np.array([load.mapped for _, load in pairs]), lengths)
        index = placeholder_indices(pairs)
        columns = move_columns(pairs, self.block_size)
        columns += [mean_rows(entry, mapped, index, self.config.estimator), index]
        there = upload([*columns, np.where(mapped, entry, np.int32(-1))], self.device)
        for start in range(0, len(index), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            *moves, row, at, entry_at = (column[chunk] for column in there)
            self._load(TokenMoves(*moves), row, at, entry_at, bool(mapped[chunk].any()))

    def distances_of(self, probe: ProbeOp) -> list[list[float]] | None:
        return None

    def _load(
        self,
        moves: TokenMoves,
        row: torch.Tensor,
        index: torch.Tensor,
        entry: torch.Tensor,
        mapped: bool,
    ) -> None:
        """Load tokens with their corrections; ``mapped``: maps have a part in some of them.

        Args:
            row: int64 ``[tokens]``, where their means lie.
            index, entry: int32 ``[tokens]``, the index in their placeholder, and whose map they go
                through; negative = none.
        """
        assert self.kernel is not None
        for group, arena in zip(self.groups, self.arenas, strict=True):
            undo, redo = turns_of(group.rope, moves.source_positions, moves.positions)
            code = None
            if mapped:
                code = arena.codes(arena.features.raw(moves.source_slots, undo), index, entry)
            change = arena.correction(row, entry, code)
            self.kernel(group.pages, moves.source_slots, moves.slots, undo, redo, change)

    def learn(self, op: LessonOp) -> list[list[float]]:
        """Take the deviations of a lesson's spans in, all parts of one text, as one anchor; the
        error sums of this rank.
        """
        for entry in op.fresh:
            for arena in self.arenas:
                arena.reset(entry)
        return [self._learn(op.block_ids, op.spans)] if op.spans else []

    @property
    def unsettled(self) -> bool:
        return any(arena.unsolved for arena in self.arenas)

    def settle(self) -> None:
        next(arena for arena in self.arenas if arena.unsolved).solve(SETTLED_LAYERS)

    def _learn(self, block_ids: list[int], parts: list[LoadOp]) -> list[float]:
        (entry,) = {part.entry for part in parts}
        indices = placeholder_indices((block_ids, part) for part in parts)
        index = upload([indices.astype(np.int64)], self.device)[0]
        total = ErrorSums().as_list()
        for group, arena in zip(self.groups, self.arenas, strict=True):
            base = base_of(group, parts, self.block_size)
            true = true_of(group, parts, block_ids, self.block_size)
            sums = arena.learn(
                entry,
                index,
                arena.features.raw(base.slots, base.undo),
                deviations(group, base, true, arena.skip_layers),
                self.judged_from,
            )
            total = [a + b for a, b in zip(total, sums.as_list(), strict=True)]
        return total


def _examples(group: LayerGroup, arena: ResidualArena) -> list[MeanMap]:
    """One correction of each kind, of one token that lies nowhere."""
    nowhere = torch.full((1,), -1, device=arena.device)
    first, none = torch.zeros_like(nowhere), torch.zeros(1, dtype=torch.int32, device=arena.device)
    undo, _ = turns_of(group.rope, first, first)
    if accelerator.accelerated(arena.device):
        raw = arena.features.raw(nowhere, undo)
    else:
        raw = torch.zeros(1, arena.features.raw_width)
    codes = (None, arena.codes(raw, none, none))
    return [arena.correction(first, none, code) for code in codes]
