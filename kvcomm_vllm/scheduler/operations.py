# SPDX-License-Identifier: Apache-2.0
"""From a plan and the pages vLLM gave the request to the operations the workers carry out."""

from __future__ import annotations

import numpy as np

from kvcomm_vllm.kv_groups import Tables
from kvcomm_vllm.messages import EstimateOp, HoleOp, LoadOp, RequestOps
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan
from kvcomm_vllm.scheduler.state import RequestState


def operations_of(state: RequestState, plan: Plan, windowed: Tables, block_size: int) -> RequestOps:
    """Those of a request that vLLM has given its pages: ``windowed`` those of windowed groups."""
    ops = operations(state.id, plan, state.tokens(), state.block_ids, block_size)
    ops.adapter = state.adapter
    if state.windows is not None:
        state.windows.complete(ops, windowed, state.request.block_hashes)
    return ops


def operations(
    request_id: str, plan: Plan, tokens: np.ndarray, block_ids: list[int], block_size: int
) -> RequestOps:
    """``block_ids`` is the request's block table, local hits included."""
    return RequestOps(
        request_id=request_id,
        block_ids=block_ids[: -(-plan.end // block_size)],
        loads=[source_load(s, block_size) for s in plan.spans if s.estimate is None],
        holes=[
            HoleOp(start, tokens[start:end].tolist(), int(tokens[end]))
            for start, end in plan.holes()
        ],
        estimates=[
            EstimateOp(
                source_load(span, block_size),
                list(span.estimate.anchors),
                span.estimate.start,
                span.estimate.stop,
                span.estimate.behind_end,
                list(span.estimate.known),
            )
            for span in plan.spans
            if span.estimate is not None
        ],
        first_token=plan.local,
        tokens=tokens[plan.local : plan.end].astype(np.int32, copy=False).tobytes(),
    )


def source_load(span: ReuseSpan, block_size: int) -> LoadOp:
    """The span's part of its source: what lies before it is its seam."""
    source = span.source
    skip = span.start - source.prompt_start
    first, offset = divmod(source.block_offset + skip, block_size)
    return LoadOp(
        source_blocks=source.blocks[first:],
        source_offset=offset,
        source_start=source.place_of(span.start),
        prompt_start=span.start,
        length=span.length,
        entry=-1 if span.entry is None else span.entry,
        placeholder_index=span.start - span.placeholder_start,
        mapped=span.mapped,
    )
