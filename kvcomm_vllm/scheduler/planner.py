# SPDX-License-Identifier: Apache-2.0
"""The planner: which of the spans found are reused, so that it pays.

A plan saves the tokens it loads, and pays for them twice. What it computes up to its last span is
computed outside vLLM's token budget. And whatever follows its first moved token becomes private to
the request: nobody else, and not even the prefix cache of a later exact request, can use it.
Text whose KV has seen too little of what it stands behind now is not worth it at any price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeAlias

import numpy as np

from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan, grouped, texts

UnseenShare: TypeAlias = Callable[[Iterable[ReuseSpan]], float]
StaleShare: TypeAlias = Callable[[Listing[ReuseSpan]], float]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan must respect; see the configuration keys of the same names."""

    seam_tokens: int
    anchor_seam_tokens: int
    min_span_tokens: int
    min_reuse_tokens: int
    min_reuse_share: float
    private_price: float
    max_unseen_share: float
    max_refresh_share: float


@dataclass(frozen=True, slots=True)
class Stretch:
    """Spans that touch each other."""

    spans: tuple[ReuseSpan, ...]

    @property
    def start(self) -> int:
        return self.spans[0].start

    @property
    def end(self) -> int:
        return self.spans[-1].end

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def exact(self) -> bool:
        """Whether its KV is what plain vLLM would compute."""
        return all(moved_from(span) is None for span in self.spans)


def stretches(spans: Iterable[ReuseSpan], min_tokens: int) -> list[Stretch]:
    """Spans by stretches of at least ``min_tokens``, in order."""
    whole = (Stretch(tuple(group)) for group in grouped(spans, ReuseSpan.touches))
    return [stretch for stretch in whole if stretch.length >= min_tokens]


def make_plan(
    local: int,
    spans: Iterable[ReuseSpan],
    total: int,
    limits: Limits,
    unseen: UnseenShare,
    stale: StaleShare,
) -> Plan | Reason:
    """The stretches with the best balance.

    The balance is the number of reused tokens, less ``min_reuse_share`` of all that is loaded or
    computed up to the last of them, less ``private_price`` for each token computed behind the first
    moved one. A plan may begin late, so that a long text of the request's own stays exact, and end
    early, where going on would save too little.

    Args:
        local: tokens of vLLM's own prefix hit.
        spans: in order, behind ``local``.
        total: tokens of the prompt.
        unseen: see :meth:`~kvcomm_vllm.scheduler.context.Context.unseen_share`.
        stale: see :meth:`~kvcomm_vllm.scheduler.refresh.Refresh.stale_share`.
    """
    found = stretches(spans, limits.min_span_tokens)
    if not found:
        return Reason.TOO_SHORT
    if limits.max_refresh_share:
        whole = [span for stretch in found for span in stretch.spans]
        shares = ((text, stale(text)) for text in texts(whole))
        fresh = [text for text, share in shares if 1 > share <= limits.max_refresh_share]
        found = stretches(chain.from_iterable(fresh), limits.min_span_tokens)
    found = [stretch for stretch in found if unseen(stretch.spans) <= limits.max_unseen_share]
    if not found:
        return Reason.OUT_OF_CONTEXT
    plan = _best(local, found, total, limits)
    if plan is not None:
        return plan
    free = replace(limits, private_price=0.0)
    return Reason.TOO_LITTLE if _best(local, found, total, free) is None else Reason.COSTS_PREFIX


def _best(local: int, found: Listing[Stretch], total: int, limits: Limits) -> Plan | None:
    """The stretches ``first..last`` with the largest balance above nought; of equal ones the most
    tokens. Leading stretches that are exact taint nothing: all before the last are taken.
    """
    exact = next((n for n, stretch in enumerate(found) if not stretch.exact), len(found))
    starts = np.array([stretch.start for stretch in found])
    sums = np.cumsum([0, *(stretch.length for stretch in found)])
    best: tuple[float, int, int, int] | None = None
    for last, stretch in enumerate(found):
        firsts = np.arange(exact, last + 1) if last >= exact else np.zeros(1, np.int64)
        moved = sums[last + 1] - sums[firsts]
        reused = moved + (sums[exact] if last >= exact else 0)
        balance = reused - limits.min_reuse_share * (stretch.end - local)
        if last >= exact:
            balance -= limits.private_price * (total - starts[firsts] - moved)
        balance[reused < limits.min_reuse_tokens] = 0.0
        first = int(np.lexsort((reused, balance))[-1])
        if balance[first] > 0:
            value = (float(balance[first]), int(reused[first]), int(firsts[first]), last)
            best = value if best is None else max(best, value)
    if best is None:
        return None
    *_, first, last = best
    taken = [*found[: min(exact, first)], *found[first : last + 1]]
    return Plan(local, tuple(span for stretch in taken for span in stretch.spans))


def moved_from(span: ReuseSpan) -> int | None:
    """First token of a span whose KV is not what plain vLLM would compute; None if all of it is.

    Loading what the same conversation computed exactly is exact.
    """
    if not span.source.same_context:
        return span.start
    exact_end = span.source.exact_end
    return max(span.start, exact_end) if exact_end < span.end else None


def first_approximate(plan: Plan) -> int | None:
    """First token whose KV is not what plain vLLM would compute; None for a plan that is exact.

    What follows an approximate token is approximate, too.
    """
    return next((at for at in map(moved_from, plan.spans) if at is not None), None)


def generation(plan: Plan) -> int:
    """How many copies lie between exact KV and the worst that this plan makes; see ``Sequence``."""
    found = 0
    for span in plan.spans:
        source = span.source
        copies = source.sequence.generation or 1 if source.exact_end < span.end else 0
        found = max(found, copies + (not source.same_context))
    return found
