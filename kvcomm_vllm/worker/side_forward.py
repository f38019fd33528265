# SPDX-License-Identifier: Apache-2.0
"""Side forward: computes the holes between loaded spans before vLLM's own forward needs them.

Each hole is one row of a batch with its request's block table and its own sequence length. Every
layer writes all rows' K and V before it attends, so a later hole of a request reads an earlier
one's fresh KV of the same layer, and the result equals dense prefill, token for token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from kvcomm_vllm.compat.adapters import adapters_of
from kvcomm_vllm.compat.drafter import drafter_of
from kvcomm_vllm.compat.metadata import common_metadata, metadata_builders
from kvcomm_vllm.compat.model import (
    forward_context,
    forwards_embeddings,
    keeps_embeddings,
    model_inputs,
    model_positions,
    position_rows,
)
from kvcomm_vllm.kv_groups import Tables
from kvcomm_vllm.messages import HoleOp
from kvcomm_vllm.worker.load import slots_of
from kvcomm_vllm.worker.upload import upload


class RanksApartError(RuntimeError):
    """A forward failed on this rank, and others may be in the middle of it. Whatever this rank sent
    next they would take for their own forward's sums, so the engine ends as with vLLM's forwards.
    """


@dataclass(frozen=True)
class Row:
    """One hole and the block table of its request.

    Args:
        shift: added to positions alone; not 0 only in the check at start.
        adapter: vLLM's number of the LoRA adapter it is computed with; 0 for none.
        windowed: block tables of other KV cache groups than that of full attention.
    """

    block_ids: list[int]
    hole: HoleOp
    shift: int = 0
    adapter: int = 0
    windowed: Tables = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.hole.start + len(self.hole.tokens)

    @property
    def shifted(self) -> list[int]:
        """The tokens behind each of its own; the last one's own where none is known."""
        tokens, following = self.hole.tokens, self.hole.following
        return [*tokens[1:], following if following >= 0 else tokens[-1]]

    def table(self, group: int) -> list[int]:
        """Its block table in one of vLLM's KV cache groups."""
        return self.windowed.get(group, self.block_ids)


def batches(
    rows: list[Row], max_tokens: int, max_rows: int, apart: bool = False
) -> list[list[Row]]:
    """Rows in order, cut into forwards of at most ``max_tokens`` and ``max_rows``, for which vLLM's
    metadata builders have room; a row of more tokens is cut itself.

    Args:
        apart: rows with and without adapter take different forwards.
    """
    done: list[list[Row]] = [[]]
    room = max_tokens
    for row in rows:
        tokens, start = row.hole.tokens, row.hole.start
        alien = apart and any(bool(other.adapter) != bool(row.adapter) for other in done[-1][-1:])
        while tokens:
            if not room or len(done[-1]) == max_rows or alien:
                done.append([])
                room, alien = max_tokens, False
            piece, tokens = tokens[:room], tokens[room:]
            following = tokens[0] if tokens else row.hole.following
            done[-1].append(replace(row, hole=HoleOp(start, piece, following)))
            start += len(piece)
            room -= len(piece)
    return [batch for batch in done if batch]


class SideForward:
    """Computes the KV of holes and lessons by extra forwards of vLLM's own model.

    Args:
        runner: vLLM's model runner.
        block_size: tokens per page of the block tables.

    Attributes:
        adapters: with which rows can be computed.
        drafter: whose KV is computed with the rows', if there is one.

    All its methods raise :class:`RanksApartError` for whatever fails where there are several ranks.

    Raises:
        UnknownAdaptersError: the runner has LoRA adapters, and it is not known how.
        UnknownPositionsError: its model is told positions in a way that is not known.
        UnknownDrafterError: tokens are guessed ahead, and it is not known how.
    """

    def __init__(self, runner: Any, block_size: int) -> None:
        self.runner = runner
        self.block_size = block_size
        self.device: torch.device = runner.device
        limits = runner.vllm_config.scheduler_config
        self.max_tokens = int(limits.max_num_batched_tokens)
        self.max_rows = int(limits.max_num_seqs)
        # such models are compiled for embeddings, not for token ids
        embeds = forwards_embeddings(runner.vllm_config.model_config)
        self.always_eager = embeds and keeps_embeddings(runner.model)
        self.embeds = embeds and not self.always_eager
        self.position_rows = position_rows(runner.vllm_config.model_config)
        self.adapters = adapters_of(runner)
        self.drafter = drafter_of(runner)
        self.builders = metadata_builders(runner)
        self.single = runner.vllm_config.parallel_config.tensor_parallel_size == 1

    def run(self, rows: list[Row], eager: bool = False) -> None:
        """Writes the rows' K and V into their pages; ``eager`` leaves the compiled model alone."""
        with self._together():
            for batch in batches(rows, self.max_tokens, self.max_rows, self.adapters.apart):
                self._forward(batch, eager or self.always_eager)

    def last_logits(self, rows: list[Row]) -> torch.Tensor | None:
        """Writes the rows like :meth:`run`, each in a forward of its own.

        Returns:
            The logits behind each row's last token: ``[rows, vocabulary]``; None on a rank that is
            not told them all.
        """
        with self._together(), torch.inference_mode():
            ends = [self._forward([row], self.always_eager)[-1:].clone() for row in rows]
            numbers = [row.adapter for row in rows]
            self.adapters.use(numbers, numbers)
            logits: torch.Tensor | None = self.runner.model.compute_logits(torch.cat(ends))
        return logits

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            with self.adapters.aside():
                yield
        except Exception as error:
            if self.single:
                raise
            raise RanksApartError("a forward beside vLLM's failed on a rank") from error

    def _forward(self, rows: list[Row], eager: bool) -> torch.Tensor:
        """Returns the model's last hidden states: ``[tokens, width]``."""
        lengths = np.array([len(row.hole.tokens) for row in rows], dtype=np.int32)
        ends = np.array([row.end for row in rows], dtype=np.int32)
        starts = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
        total = int(starts[-1])
        ids = np.concatenate([np.asarray(row.hole.tokens, dtype=np.int32) for row in rows])
        spans = [np.arange(row.hole.start, row.end, dtype=np.int64) + row.shift for row in rows]
        numbers = sorted({builder.number for builder in self.builders})
        tables = [array for number in numbers for array in self._tables(rows, number)]
        lists = (np.concatenate(spans), ids, starts, ends, *tables)
        positions, ids_there, starts_there, ends_there, *tables_there = upload(lists, self.device)
        by_group = dict(zip(numbers, zip(*[iter(tables_there)] * 2, strict=True), strict=True))

        commons = {
            number: common_metadata(
                query_start_loc=starts_there,
                query_start_loc_cpu=torch.from_numpy(starts),
                seq_lens=ends_there,
                seq_lens_cpu_upper_bound=torch.from_numpy(ends),
                num_reqs=len(rows),
                num_actual_tokens=total,
                max_query_len=int(lengths.max()),
                max_seq_len=int(ends.max()),
                block_table_tensor=table,
                slot_mapping=slots_there,
                causal=True,
                positions=positions,
                is_prefilling=torch.ones(len(rows), dtype=torch.bool),
            )
            for number, (slots_there, table) in by_group.items()
        }
        adapters = np.array([row.adapter for row in rows])
        # Compiled code is the same for all adapters: vLLM tells them apart in CUDA graphs alone,
        # which take no part in this.
        self.adapters.use(np.repeat(adapters, lengths).tolist(), adapters.tolist())
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for builder in self.builders:
            common = commons[builder.number]
            metadata.update(dict.fromkeys(builder.layer_names, builder.build(common)))
            slots.update(dict.fromkeys(builder.layer_names, common.slot_mapping))
        config = self.runner.vllm_config
        with torch.inference_mode(), forward_context(metadata, config, total, slots, eager):
            hidden: torch.Tensor | tuple[torch.Tensor, ...] = self.runner.model(
                **model_inputs(self.runner.model, ids_there, self.embeds),
                positions=model_positions(positions, self.position_rows, self.max_tokens),
            )
        if self.drafter is not None:
            shifted = np.concatenate([np.asarray(row.shifted, dtype=np.int32) for row in rows])
            (following,) = upload((shifted,), self.device)
            with torch.inference_mode(), forward_context(metadata, config, total, slots, eager):
                self.drafter(hidden, ids_there, following, positions)
        return hidden if isinstance(hidden, torch.Tensor) else hidden[0]

    def _tables(self, rows: list[Row], group: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots ``[tokens]`` and the block table ``[rows, pages]`` of one KV cache group."""
        tables = [row.table(group) for row in rows]
        table = np.zeros((len(rows), max(map(len, tables))), dtype=np.int32)
        for i, pages in enumerate(tables):
            table[i, : len(pages)] = pages
        pairs = zip(rows, tables, strict=True)
        slots = [
            slots_of(pages, row.hole.start, len(row.hole.tokens), self.block_size)
            for row, pages in pairs
        ]
        return np.concatenate(slots), table
