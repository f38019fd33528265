# SPDX-License-Identifier: Apache-2.0
"""The planner: from sources found to spans to be reused, if that pays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan, Source


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan must respect; see the configuration keys of the same names."""

    seam_tokens: int
    anchor_seam_tokens: int
    min_span_tokens: int
    min_reuse_tokens: int
    min_reuse_share: float
    max_hole_tokens: int


def reuse_spans(sources: Iterable[Source], limits: Limits) -> list[ReuseSpan]:
    """Each source long enough becomes a span behind its seam.

    A span that continues its own conversation (``same_context``) needs no seam.
    """
    spans = []
    for source in sources:
        seam = 0 if source.same_context else min(limits.seam_tokens, source.length)
        if source.length - seam >= limits.min_span_tokens:
            spans.append(ReuseSpan(source.prompt_start + seam, source.end, seam, source))
    return spans


def make_plan(local: int, sources: Iterable[Source], limits: Limits) -> Plan | Reason:
    """The leading spans with the best balance of tokens saved against tokens computed in holes.

    A hole token costs about what a prefill token costs, but outside vLLM's token budget, and
    whatever follows the first reused token becomes private to the request. So a plan ends where
    going on would save too little for what it computes, and is declined where nothing is left that
    pays.
    """
    found = list(sources)
    spans = reuse_spans(found, limits)
    if not spans:
        return Reason.TOO_SHORT if found else Reason.NO_MATCH
    best: Plan | None = None
    best_value, over_budget = (0.0, 0), False
    for count in range(1, len(spans) + 1):
        plan = Plan(local, tuple(spans[:count]))
        if plan.hole_tokens > limits.max_hole_tokens:
            over_budget = True
            break
        balance = plan.reused_tokens - limits.min_reuse_share * plan.external_tokens
        value = (balance, plan.reused_tokens)  # of plans that balance alike the larger one
        if plan.reused_tokens >= limits.min_reuse_tokens and value > best_value:
            best, best_value = plan, value
    if best is None:
        return Reason.HOLE_BUDGET if over_budget else Reason.TOO_LITTLE
    return best


def first_approximate(plan: Plan) -> int | None:
    """First token whose KV is not what plain vLLM would compute; None for a plan that is exact.

    Loading what the same conversation computed exactly is exact. What follows an approximate token
    is approximate, too.
    """
    for span in plan.spans:
        if not span.source.same_context:
            return span.start
        source = span.source.sequence.first_approximate
        if source is not None and source < span.end:
            return max(span.start, source)
    return None
