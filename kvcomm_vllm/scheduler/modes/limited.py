# SPDX-License-Identifier: Apache-2.0
"""Plans within the fidelity budget: spans of limited placeholders behind longer seams, or none."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import replace
from itertools import groupby
from operator import itemgetter

from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.fidelity import Ledger, Level, Use
from kvcomm_vllm.scheduler.modes.base import Found
from kvcomm_vllm.scheduler.modes.placeholders import Placeholder
from kvcomm_vllm.scheduler.planner import make_plan
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan

SEAMS = 4  # times seam_tokens


def uses_of(ledger: Ledger, plan: Plan, there: Listing[Placeholder]) -> list[Use]:
    """How each span of a plan is to be treated; what goes on in its own context is not limited."""
    free = [span.source.same_context for span in plan.spans]
    return [
        Use("", Level.NORMAL) if mine else ledger.use(placeholder.key)
        for mine, placeholder in zip(free, there, strict=True)
    ]


def without_computed(
    plan: Plan, there: list[Placeholder], uses: list[Use], found: Found, total: int
) -> tuple[Plan, list[Placeholder], list[Use]] | Reason:
    """The plan without spans that are to be computed, if it is still worth it, and the placeholders
    and uses of those that are left.
    """
    by_span = {id(s): (p, u) for s, p, u in zip(plan.spans, there, uses, strict=True)}
    kept = [span for span in plan.spans if by_span[id(span)][1].level is not Level.COMPUTED]
    if len(kept) == len(plan.spans):
        return plan, there, uses
    left = _plan(kept, found, total)
    if isinstance(left, Reason):
        return left
    rest = [by_span[id(span)] for span in left.spans]
    return left, [placeholder for placeholder, _ in rest], [use for _, use in rest]


def with_longer_seams(
    plan: Plan,
    there: list[Placeholder],
    uses: list[Use],
    seam_tokens: int,
    found: Found,
    total: int,
) -> Plan | Reason:
    """The plan with the first tokens of limited placeholders computed, if it is still worth it."""
    if all(use.level is Level.NORMAL for use in uses):
        return plan
    spans: list[ReuseSpan] = []
    rows = zip(plan.spans, there, uses, strict=True)
    for _, group in groupby(rows, key=itemgetter(1)):
        placeholder = list(group)
        first = placeholder[0][0]
        begin = first.start - first.seam + SEAMS * seam_tokens
        limited = placeholder[0][2].level is Level.LONGER_SEAMS
        spans += _from(begin if limited else 0, (span for span, _, _ in placeholder))
    return _plan(spans, found, total)


def _from(begin: int, spans: Iterable[ReuseSpan]) -> list[ReuseSpan]:
    """What of the spans lies behind ``begin``."""
    return [
        replace(span, start=max(span.start, begin), seam=span.seam + max(0, begin - span.start))
        for span in spans
        if span.end > begin
    ]


def _plan(spans: list[ReuseSpan], found: Found, total: int) -> Plan | Reason:
    plan = make_plan(found.local, spans, total, found.limits, found.unseen, found.stale)
    return Reason.FIDELITY if isinstance(plan, Reason) else plan
