# SPDX-License-Identifier: Apache-2.0
"""A plan covers every token of its prompt once; its operations read each from its own slot."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import SIZE, any_limits, limits, local_and_sources, plan_for, source

from kvcomm_vllm.scheduler.operations import operations
from kvcomm_vllm.scheduler.planner import Limits
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan, Source, Treatment

Given = tuple[int, list[Source]]


def plan_of(found: Given, given_limits: Limits) -> Plan | None:
    plan = plan_for(*found, given_limits)
    return plan if isinstance(plan, Plan) else None


@given(local_and_sources(), any_limits, st.integers(1, 50))
def test_treatments_cover_the_prompt_without_overlap(
    found: Given, given_limits: Limits, tail: int
) -> None:
    plan = plan_of(found, given_limits)
    if plan is None:
        return
    total = plan.end + tail
    spans = plan.treatments(total)
    assert spans[0][0] == 0
    assert spans[-1][1] == total
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert all(start < end for start, end, _ in spans)
    count = {kind: sum(e - s for s, e, k in spans if k is kind) for kind in Treatment}
    assert count[Treatment.LOCAL] == plan.local
    assert count[Treatment.REUSE] == plan.reused_tokens
    assert count[Treatment.COMPUTE] == plan.hole_tokens + tail


@given(local_and_sources(), any_limits)
def test_holes_and_spans_are_the_external_tokens(found: Given, given_limits: Limits) -> None:
    plan = plan_of(found, given_limits)
    if plan is None:
        return
    covered = [range(start, end) for start, end in plan.holes()]
    covered += [range(span.start, span.end) for span in plan.spans]
    positions = sorted(position for run in covered for position in run)
    assert positions == list(range(plan.local, plan.local + plan.external_tokens))
    assert sum(end - start for start, end in plan.holes()) == plan.hole_tokens
    assert 0 <= plan.seam_tokens <= plan.hole_tokens


@given(local_and_sources(), any_limits)
def test_loads_read_each_token_from_its_own_slot(found: Given, given_limits: Limits) -> None:
    """Source page and offset of every token, followed one by one."""
    plan = plan_of(found, given_limits)
    if plan is None:
        return
    tokens = np.arange(plan.end + 1, dtype=np.int32) + 1000
    table = list(range(500, 500 + len(tokens) // SIZE + 3))
    ops = operations("r", plan, tokens, table, SIZE)
    assert ops.block_ids == table[: -(-plan.end // SIZE)]
    for span, load in zip(plan.spans, ops.loads, strict=True):
        origin = span.source
        assert (load.prompt_start, load.length) == (span.start, span.length)
        for index in range(load.length):
            page, offset = divmod(load.source_offset + index, SIZE)
            position = origin.sequence_start + (span.start - origin.prompt_start) + index
            assert load.source_blocks[page] == 100 + position // SIZE
            assert offset == position % SIZE
            assert load.source_start + index == position
        assert load.source_offset < SIZE
    for hole in ops.holes:
        assert hole.tokens == [1000 + hole.start + n for n in range(len(hole.tokens))]
    assert ops.first_token == plan.local


def test_adjacent_spans_leave_only_the_seam_between_them() -> None:
    plan = plan_for(0, [source(0, 20), source(20, 20, 100)], limits(seam_tokens=3))
    assert isinstance(plan, Plan)
    assert plan.holes() == [(0, 3), (20, 23)]


def test_a_span_without_seam_behind_the_local_hit_leaves_no_hole() -> None:
    plan = Plan(8, (ReuseSpan(8, 28, 0, source(8, 20, same_context=True)),))
    assert plan.holes() == []
    assert plan.treatments(30) == [
        (0, 8, Treatment.LOCAL),
        (8, 28, Treatment.REUSE),
        (28, 30, Treatment.COMPUTE),
    ]
