# SPDX-License-Identifier: Apache-2.0
"""Side forward: computes the holes between loaded spans before vLLM's own forward needs them.

Each hole is one row of a batch with its request's block table and its own sequence length. Every
layer writes all rows' K and V before it attends, so a later hole of a request reads an earlier
one's fresh KV of the same layer, and the result equals dense prefill, token for token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvcomm_vllm import compat
from kvcomm_vllm.messages import HoleOp
from kvcomm_vllm.worker.load import slots_of


@dataclass(frozen=True)
class Row:
    """One hole and the block table of its request.

    Args:
        shift: added to positions alone; not 0 only in the check at start.
    """

    block_ids: list[int]
    hole: HoleOp
    shift: int = 0

    @property
    def end(self) -> int:
        return self.hole.start + len(self.hole.tokens)


def batches(rows: list[Row], max_tokens: int, max_rows: int) -> list[list[Row]]:
    """Rows in order, cut into forwards of at most ``max_tokens`` and ``max_rows``, for which vLLM's
    metadata builders have room; a row of more tokens is cut itself.
    """
    done: list[list[Row]] = [[]]
    room = max_tokens
    for row in rows:
        tokens, start = row.hole.tokens, row.hole.start
        while tokens:
            if not room or len(done[-1]) == max_rows:
                done.append([])
                room = max_tokens
            piece, tokens = tokens[:room], tokens[room:]
            done[-1].append(Row(row.block_ids, HoleOp(start, piece), row.shift))
            start += len(piece)
            room -= len(piece)
    return [batch for batch in done if batch]


class SideForward:
    """Computes the KV of holes and lessons by extra forwards of vLLM's own model.

    Args:
        runner: vLLM's model runner.
        block_size: tokens per page of the block tables.
    """

    def __init__(self, runner: Any, block_size: int) -> None:
        self.runner = runner
        self.block_size = block_size
        self.device: torch.device = runner.device
        limits = runner.vllm_config.scheduler_config
        self.max_tokens = int(limits.max_num_batched_tokens)
        self.max_rows = int(limits.max_num_seqs)
        # such models are compiled for embeddings, not for token ids
        self.always_eager = compat.forwards_embeddings(runner.vllm_config.model_config)
        self._builders = compat.metadata_builders(runner, private=self.device.type != "cpu")

    def run(self, rows: list[Row], eager: bool = False) -> None:
        """Writes the rows' K and V into their pages; ``eager`` leaves the compiled model alone."""
        for batch in batches(rows, self.max_tokens, self.max_rows):
            self._forward(batch, eager or self.always_eager)

    def _forward(self, rows: list[Row], eager: bool) -> None:
        lengths = np.array([len(row.hole.tokens) for row in rows], dtype=np.int32)
        ends = np.array([row.end for row in rows], dtype=np.int32)
        starts = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
        total = int(starts[-1])
        table = np.zeros((len(rows), max(len(row.block_ids) for row in rows)), dtype=np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row.block_ids)] = row.block_ids
        ids = np.concatenate([np.asarray(row.hole.tokens, dtype=np.int64) for row in rows])
        spans = [np.arange(row.hole.start, row.end, dtype=np.int64) + row.shift for row in rows]
        positions = self._tensor(np.concatenate(spans))
        slots = self._tensor(
            np.concatenate(
                [
                    slots_of(row.block_ids, row.hole.start, len(row.hole.tokens), self.block_size)
                    for row in rows
                ]
            )
        )
        starts_cpu, ends_cpu = torch.from_numpy(starts), torch.from_numpy(ends)
        common = compat.common_metadata(
            query_start_loc=starts_cpu.to(self.device),
            query_start_loc_cpu=starts_cpu,
            seq_lens=ends_cpu.to(self.device),
            seq_lens_cpu_upper_bound=ends_cpu,
            num_reqs=len(rows),
            num_actual_tokens=total,
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=self._tensor(table),
            slot_mapping=slots,
            causal=True,
            positions=positions,
            is_prefilling=torch.ones(len(rows), dtype=torch.bool),
        )
        metadata: dict[str, Any] = {}
        for builder, layer_names in self._builders:
            metadata.update(dict.fromkeys(layer_names, builder.build(0, common)))
        with (
            torch.inference_mode(),
            compat.forward_context(metadata, self.runner.vllm_config, total, slots, eager),
        ):
            self.runner.model(input_ids=self._tensor(ids).to(torch.int32), positions=positions)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)
