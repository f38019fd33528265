# SPDX-License-Identifier: Apache-2.0
"""The planner reuses where it pays, and says why where it does not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import any_limits, limits, local_and_sources, sequence, source

from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.planner import Limits, first_approximate, make_plan, reuse_spans
from kvcomm_vllm.scheduler.spans import Plan, Source

Given = tuple[int, list[Source]]


@given(local_and_sources(), any_limits)
def test_a_plan_respects_every_limit(found: Given, given_limits: Limits) -> None:
    local, sources = found
    plan = make_plan(local, sources, given_limits)
    if isinstance(plan, Reason):
        return
    assert plan.reused_tokens >= given_limits.min_reuse_tokens
    assert plan.hole_tokens <= given_limits.max_hole_tokens
    assert plan.reused_tokens >= given_limits.min_reuse_share * plan.external_tokens
    for span in plan.spans:
        assert span.length >= given_limits.min_span_tokens
        if span.source.same_context:
            assert span.seam == 0
        else:
            assert span.seam == given_limits.seam_tokens
        assert span.start - span.seam == span.source.prompt_start
        assert span.end == span.source.end


@given(local_and_sources(), any_limits)
def test_no_other_end_of_the_plan_has_a_better_balance(found: Given, given_limits: Limits) -> None:
    local, sources = found
    spans = reuse_spans(sources, given_limits)
    share = given_limits.min_reuse_share

    def balance(plan: Plan) -> float:
        return (1 - share) * plan.reused_tokens - share * plan.hole_tokens

    allowed = [
        plan
        for plan in (Plan(local, tuple(spans[:count])) for count in range(1, len(spans) + 1))
        if plan.hole_tokens <= given_limits.max_hole_tokens
        and plan.reused_tokens >= given_limits.min_reuse_tokens
        and plan.reused_tokens >= share * plan.external_tokens
    ]
    plan = make_plan(local, sources, given_limits)
    if allowed:
        assert isinstance(plan, Plan)
        assert balance(plan) >= max(map(balance, allowed)) - 1e-6
    else:
        assert isinstance(plan, Reason)


@given(local_and_sources(), any_limits)
def test_the_first_approximate_token_is_the_first_that_is_moved(
    found: Given, given_limits: Limits
) -> None:
    plan = make_plan(*found, given_limits)
    if isinstance(plan, Reason):
        return
    moved = [
        position
        for span in plan.spans
        for position in range(span.start, span.end)
        if not span.source.same_context
        or (
            span.source.sequence.first_approximate is not None
            and position >= span.source.sequence.first_approximate
        )
    ]
    assert first_approximate(plan) == (moved[0] if moved else None)


def test_nothing_found_is_no_match() -> None:
    assert make_plan(0, [], limits()) is Reason.NO_MATCH


def test_text_that_is_all_seam_saves_nothing() -> None:
    seam = limits(seam_tokens=8, min_span_tokens=5, min_reuse_tokens=1)
    assert make_plan(0, [source(0, 12)], seam) is Reason.TOO_SHORT
    plan = make_plan(0, [source(0, 13)], seam)
    assert isinstance(plan, Plan)
    assert plan.reused_tokens == 5


def test_too_few_tokens_are_too_little() -> None:
    sources = [source(0, 24)]
    assert make_plan(0, sources, limits(min_reuse_tokens=21)) is Reason.TOO_LITTLE
    assert isinstance(make_plan(0, sources, limits(min_reuse_tokens=20)), Plan)


def test_too_large_a_hole_is_over_budget() -> None:
    sources = [source(30, 24)]
    assert make_plan(0, sources, limits(max_hole_tokens=33)) is Reason.HOLE_BUDGET
    assert isinstance(make_plan(0, sources, limits(max_hole_tokens=34)), Plan)


def test_a_share_of_one_allows_plans_without_holes_only() -> None:
    only = limits(min_reuse_share=1.0, seam_tokens=0)
    assert make_plan(0, [source(1, 60)], only) is Reason.TOO_LITTLE
    plan = make_plan(0, [source(0, 20), source(20, 20, 100), source(41, 60, 200)], only)
    assert isinstance(plan, Plan)
    assert (plan.end, plan.hole_tokens) == (40, 0)


def test_a_far_short_span_is_left_to_the_tail() -> None:
    sources = [source(0, 60), source(200, 14, 100)]
    plan = make_plan(0, sources, limits(min_reuse_share=0.3))
    assert isinstance(plan, Plan)
    assert plan.end == 60


def test_a_plan_over_budget_ends_before_the_span_that_exceeds_it() -> None:
    sources = [source(0, 60), source(80, 60, 100), source(300, 60, 200)]
    plan = make_plan(0, sources, limits(max_hole_tokens=30))
    assert isinstance(plan, Plan)
    assert plan.end == 140


def test_continuing_an_exact_conversation_is_exact() -> None:
    plan = make_plan(8, [source(8, 40, 8, same_context=True)], limits())
    assert isinstance(plan, Plan)
    assert plan.hole_tokens == 0
    assert first_approximate(plan) is None


@given(st.integers(0, 60))
def test_a_source_is_as_approximate_as_its_sequence(first: int) -> None:
    of = sequence(first_approximate=first)
    plan = make_plan(8, [source(8, 40, 8, same_context=True, of=of)], limits())
    assert isinstance(plan, Plan)
    assert first_approximate(plan) == (max(8, first) if first < 48 else None)
