# SPDX-License-Identifier: Apache-2.0
"""An estimator as CONTRIBUTING.md describes it: the mean deviation of a placeholder's tokens."""

import torch

from kvcomm_vllm.kernels.deviation import MeanMap
from kvcomm_vllm.kernels.reference import load_corrected
from kvcomm_vllm.messages import LessonOp, LoadOp, ProbeOp, RequestOps
from kvcomm_vllm.worker.corrections.base import ErrorSums, Ground
from kvcomm_vllm.worker.corrections.deviations import base_of, deviations, true_of
from kvcomm_vllm.worker.load import token_moves


class MeanCorrection:
    def __init__(self, ground: Ground) -> None:
        self.groups, self.block_size, self.room = ground.groups, ground.block_size, 8
        pages = [group.pages for group in ground.groups]
        shapes = [(self.room, len(p.layers), p.kv_heads, p.row_dim) for p in pages]
        self.sums = [torch.zeros(shape) for shape in shapes]
        self.tokens = torch.zeros(self.room)

    def describe(self) -> str:
        return f"; means of {self.room} placeholders"

    def check(self) -> None:
        """It loads with the reference."""

    def load(self, requests: list[RequestOps]) -> None:
        pairs = [(ops.block_ids, load) for ops in requests for load in ops.loads]
        for pages, load in (pair for pair in pairs if pair[1].entry >= 0):
            moves = token_moves([(pages, load)], self.block_size, torch.device("cpu"))
            row = torch.zeros(load.length, dtype=torch.int64)
            for number, group in enumerate(self.groups):
                turns = group.rope.undo(moves.source_positions), group.rope.redo(moves.positions)
                mean = MeanMap(*group.pages.split(self._mean(number, load.entry)[None]), row)
                load_corrected(group.pages, moves.source_slots, moves.slots, *turns, mean)

    def distances_of(self, probe: ProbeOp) -> None:
        return None

    def learn(self, lesson: LessonOp) -> list[list[float]]:
        for kept in (*self.sums, self.tokens):
            kept[lesson.fresh] = 0
        return [self._learn(lesson.block_ids, span) for span in lesson.spans]

    unsettled = False

    def settle(self) -> None:
        """Nothing is put off."""

    def _mean(self, number: int, entry: int) -> torch.Tensor:
        return self.sums[number][entry] / self.tokens[entry].clamp(min=1)

    def _learn(self, block_ids: list[int], span: LoadOp) -> list[float]:
        left, whole = torch.zeros(2, 2)
        for number, group in enumerate(self.groups):
            mean = self._mean(number, span.entry)
            base = base_of(group, [span], self.block_size)
            true = true_of(group, [span], block_ids, self.block_size)
            split = group.pages.split
            for layer, change in enumerate(deviations(group, base, true)):
                whole += torch.stack([part.square().sum() for part in split(change)])
                rest = split(change - mean[layer])
                left += torch.stack([part.square().sum() for part in rest])
                self.sums[number][span.entry, layer] += change.sum(0)
        self.tokens[span.entry] += span.length
        (k, v), (k_all, v_all) = left.tolist(), whole.tolist()
        return ErrorSums(k, k_all, v, v_all, k_means=k, v_means=v).as_list()
