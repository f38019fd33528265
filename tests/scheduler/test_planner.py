# SPDX-License-Identifier: Apache-2.0
"""The planner reuses where it pays, and says why where it does not."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plan_strategies import (
    SIZE,
    any_limits,
    limits,
    local_and_sources,
    plan_for,
    sequence,
    source,
)

from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.cover import cover
from kvcomm_vllm.scheduler.planner import (
    Limits,
    Stretch,
    first_approximate,
    generation,
    moved_from,
    stretches,
)
from kvcomm_vllm.scheduler.spans import Plan, Source

Given = tuple[int, list[Source]]


def balance(plan: Plan, total: int, given_limits: Limits) -> float:
    """As the planner's docstring has it, token by token."""
    first = first_approximate(plan)
    loaded = {p for span in plan.spans for p in range(span.start, span.end)}
    private = 0 if first is None else sum(p not in loaded for p in range(first, total))
    cost = given_limits.min_reuse_share * plan.external_tokens
    return plan.reused_tokens - cost - given_limits.private_price * private


@given(local_and_sources(), any_limits, st.integers(1, 200))
def test_a_plan_respects_every_limit(found: Given, given_limits: Limits, tail: int) -> None:
    local, sources = found
    plan = plan_for(local, sources, given_limits, tail)
    if isinstance(plan, Reason):
        return
    total = max(source.end for source in sources) + tail
    assert plan.reused_tokens >= given_limits.min_reuse_tokens
    assert balance(plan, total, given_limits) > 0
    for stretch in stretches(plan.spans, 0):
        assert stretch.length >= given_limits.min_span_tokens
    for span in plan.spans:
        assert span.seam <= given_limits.seam_tokens
        assert span.start - span.seam == span.source.prompt_start
        assert span.end == span.source.end


@given(local_and_sources(), any_limits, st.integers(1, 200))
def test_no_other_stretches_in_a_row_have_a_better_balance(
    found: Given, given_limits: Limits, tail: int
) -> None:
    local, sources = found
    if not sources:
        return
    total = max(source.end for source in sources) + tail
    spans = cover(sources, given_limits.seam_tokens, SIZE)
    parts = stretches(spans, given_limits.min_span_tokens)
    exact = next((n for n, part in enumerate(parts) if not part.exact), len(parts))
    assume(not any(part.exact for part in parts[exact:]))  # the same context is one from its start
    others = []
    for first, last in combinations_with_replacement(range(len(parts)), 2):
        taken: list[Stretch] = parts[first : last + 1]
        if exact <= first:
            taken = [*parts[:exact], *taken]
        elif first:
            continue
        plan = Plan(local, tuple(span for part in taken for span in part.spans))
        if plan.reused_tokens >= given_limits.min_reuse_tokens:
            others.append(balance(plan, total, given_limits))
    chosen = plan_for(local, sources, given_limits, tail)
    if max(others, default=0.0) > 1e-6:
        assert isinstance(chosen, Plan)
        assert balance(chosen, total, given_limits) >= max(others) - 1e-6
    elif isinstance(chosen, Plan):
        assert balance(chosen, total, given_limits) <= 1e-6


@given(local_and_sources(), any_limits)
def test_the_first_approximate_token_is_the_first_that_is_moved(
    found: Given, given_limits: Limits
) -> None:
    plan = plan_for(*found, given_limits)
    if isinstance(plan, Reason):
        return
    moved = [
        position
        for span in plan.spans
        for position in range(span.start, span.end)
        if not span.source.same_context
        or (
            span.source.sequence.first_approximate is not None
            and position - span.source.prompt_start + span.source.sequence_start
            >= span.source.sequence.first_approximate
        )
    ]
    assert first_approximate(plan) == (moved[0] if moved else None)


def test_text_that_is_all_seam_saves_nothing() -> None:
    seam = limits(seam_tokens=8, min_span_tokens=5, min_reuse_tokens=1)
    assert plan_for(0, [source(0, 12)], seam) is Reason.TOO_SHORT
    plan = plan_for(0, [source(0, 13)], seam)
    assert isinstance(plan, Plan)
    assert plan.reused_tokens == 5


def test_short_parts_of_one_text_count_together() -> None:
    """Where one source gives way to another, both together must be long enough, not each."""
    whole = limits(min_span_tokens=20, seam_tokens=2)
    parts = [source(0, 15), source(15, 15, 115, lead=15)]
    assert isinstance(plan_for(0, parts, whole), Plan)
    apart = [source(0, 15), source(16, 15, 115)]
    assert plan_for(0, apart, whole) is Reason.TOO_SHORT


def test_too_few_tokens_are_too_little() -> None:
    sources = [source(0, 24)]
    assert plan_for(0, sources, limits(min_reuse_tokens=21)) is Reason.TOO_LITTLE
    assert isinstance(plan_for(0, sources, limits(min_reuse_tokens=20)), Plan)


def test_a_share_of_one_allows_plans_without_holes_only() -> None:
    only = limits(min_reuse_share=1.0, seam_tokens=0)
    assert plan_for(0, [source(1, 60)], only) is Reason.TOO_LITTLE


def test_a_far_short_span_is_left_to_the_tail() -> None:
    sources = [source(0, 60), source(200, 14, 100)]
    plan = plan_for(0, sources, limits(min_reuse_share=0.3))
    assert isinstance(plan, Plan)
    assert plan.end == 60


def test_a_little_boilerplate_does_not_make_a_long_text_private() -> None:
    priced = limits(private_price=0.25)
    boilerplate = [source(0, 51)]
    assert plan_for(0, boilerplate, priced, tail=2600) is Reason.COSTS_PREFIX
    assert isinstance(plan_for(0, boilerplate, priced, tail=20), Plan)
    assert isinstance(plan_for(0, boilerplate, limits(), tail=2600), Plan)


def test_boilerplate_before_a_long_own_text_is_left_out_of_a_plan_that_pays() -> None:
    """What stands between it and the text that is worth reusing stays exact."""
    sources = [source(0, 40), source(700, 900, 100)]
    plan = plan_for(0, sources, limits(private_price=0.25), tail=9)
    assert isinstance(plan, Plan)
    assert [span.start for span in plan.spans] == [704]
    assert first_approximate(plan) == 704


def test_text_out_of_context_is_computed() -> None:
    """Stretch by stretch: what has seen enough of what it stands behind is reused."""
    sources = [source(0, 60), source(80, 60, 100)]
    shares = {4: 0.2, 84: 0.9}
    strict = limits(max_unseen_share=0.7)
    plan = plan_for(0, sources, strict, unseen=lambda spans: shares[next(iter(spans)).start])
    assert isinstance(plan, Plan)
    assert plan.end == 60
    assert plan_for(0, sources, strict, unseen=lambda spans: 0.8) is Reason.OUT_OF_CONTEXT


def test_continuing_an_exact_conversation_is_exact_and_costs_no_prefix() -> None:
    own = [source(8, 40, 8, same_context=True)]
    plan = plan_for(8, own, limits(private_price=1.0), tail=5000)
    assert isinstance(plan, Plan)
    assert plan.hole_tokens == 0
    assert first_approximate(plan) is None
    assert generation(plan) == 0


@given(st.integers(0, 60))
def test_a_source_is_as_approximate_as_its_sequence(first: int) -> None:
    of = sequence(first_approximate=first)
    plan = plan_for(8, [source(8, 40, 8, same_context=True, of=of)], limits())
    assert isinstance(plan, Plan)
    assert first_approximate(plan) == (max(8, first) if first < 48 else None)
    assert generation(plan) == (1 if first < 48 else 0)


@pytest.mark.parametrize(
    ("of_source", "same", "made"), [(0, False, 1), (1, False, 2), (2, True, 2)]
)
def test_a_copy_of_a_copy_is_a_generation_older(of_source: int, same: bool, made: int) -> None:
    of = sequence(first_approximate=0 if of_source else None)
    of.generation = of_source
    plan = plan_for(0, [source(0, 60, same_context=same, of=of)], limits())
    assert isinstance(plan, Plan)
    assert generation(plan) == made
    assert moved_from(plan.spans[0]) is not None
