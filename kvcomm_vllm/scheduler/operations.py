# SPDX-License-Identifier: Apache-2.0
"""From a plan and the pages vLLM gave the request to the operations the workers carry out."""

from __future__ import annotations

import numpy as np

from kvcomm_vllm.messages import HoleOp, LoadOp, RequestOps
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan


def operations(
    request_id: str, plan: Plan, tokens: np.ndarray, block_ids: list[int], block_size: int
) -> RequestOps:
    """``block_ids`` is the request's block table, local hits included."""
    return RequestOps(
        request_id=request_id,
        block_ids=block_ids[: -(-plan.end // block_size)],
        loads=[_load(span, block_size) for span in plan.spans],
        holes=[HoleOp(start, tokens[start:end].tolist()) for start, end in plan.holes()],
    )


def _load(span: ReuseSpan, block_size: int) -> LoadOp:
    """The span's part of its source: what lies before it is its seam."""
    source = span.source
    skip = span.start - source.prompt_start
    first, offset = divmod(source.block_offset + skip, block_size)
    return LoadOp(
        source_blocks=source.blocks[first:],
        source_offset=offset,
        source_start=source.sequence_start + skip,
        prompt_start=span.start,
        length=span.length,
        entry=-1 if span.entry is None else span.entry,
        slot_index=span.seam,
    )
