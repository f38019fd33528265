# SPDX-License-Identifier: Apache-2.0
"""Refresh: tokens of reused text that are computed again, since an edit has moved their KV most.

These are few: tokens that repeated something in the context their KV saw and do not in this one, or
the other way around, and those that the next token will look at (see :mod:`repeats`). What was
measured: docs/experiments/edits.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from kvcomm_vllm.scheduler.index import I32, Sequence
from kvcomm_vllm.scheduler.repeats import Bools, precedents, repeats
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan

# A load of fewer tokens is not worth an operation: they are computed with their neighbours.
LEAST_LOAD = 4


class Refresh:
    """What of one prompt is to be computed again.

    Args:
        prompt: token ids, int32 ``[n]``.
    """

    def __init__(self, prompt: I32) -> None:
        self._prompt = prompt

    @cached_property
    def repeats(self) -> Bools:
        """Which tokens of the prompt are repetitions."""
        return repeats(self._prompt)

    @cached_property
    def _precedents(self) -> Bools:
        return precedents(self._prompt)

    def stale(self, span: ReuseSpan) -> Bools:
        """Tokens of a span whose KV does not fit its new context: bool ``[length]``.

        KV of the same context fits as far as it is exact.
        """
        source, start = span.source, span.start
        stale: Bools = _saw(span) != self.repeats[start : span.end]
        if stale.any():  # an edit that moves nothing else moves these little
            stale |= self._precedents[start : span.end]
        if source.same_context:
            stale[: max(0, source.exact_end - start)] = False
        return stale

    def stale_share(self, span: ReuseSpan) -> float:
        """The share of a span's tokens that would be computed again."""
        kept = sum(stop - start for start, stop in runs(~self.stale(span)))
        return 1 - kept / span.length

    def cut(self, plan: Plan, block_size: int) -> Plan:
        """The plan with holes for what is to be computed again."""
        spans = (part for span in plan.spans for part in self._parts(span, block_size))
        return Plan(plan.local, tuple(spans))

    def _parts(self, span: ReuseSpan, block_size: int) -> list[ReuseSpan]:
        kept = runs(~self.stale(span))
        parts, before = [], span.start - span.seam
        for first, stop in kept:
            start, end = span.start + first, span.start + stop
            source = span.source.part(before, end, block_size)
            parts.append(replace(span, start=start, end=end, seam=start - before, source=source))
            before = end
        return parts


def runs(kept: Bools) -> list[tuple[int, int]]:
    """The runs ``(start, stop)`` of kept tokens that are worth an operation, in order."""
    edges = np.flatnonzero(np.diff(kept, prepend=False, append=False)).reshape(-1, 2)
    long = edges[:, 1] - edges[:, 0] >= LEAST_LOAD
    return [(int(start), int(stop)) for start, stop in edges[long]]


def seen_repeats(sequence: Sequence) -> Bools:
    """Which tokens of a stored sequence were repetitions when their KV was computed: bool [n].

    Where it was not kept, all of it was computed where it stands.
    """
    known = sequence.repeats
    if known is None or len(known) < len(sequence.tokens):
        own = repeats(sequence.tokens)
        if known is not None:
            own[: len(known)] = known
        sequence.repeats = known = own
    return known


def seen_by(own: Bools, plan: Plan | None, local: Bools | None) -> Bools:
    """The same for a prompt as it is served: what is loaded has seen what its source saw.

    Args:
        own: what repeats in the prompt itself.
        local: what the KV of its local hit saw; None if that is exact.
    """
    seen = own.copy()
    if local is not None:
        seen[: len(local)] = local
    for span in plan.spans if plan else ():
        seen[span.start : span.end] = _saw(span)
    return seen


def _saw(span: ReuseSpan) -> Bools:
    """Which of a span's tokens were repetitions where their KV was computed."""
    first = span.source.place_of(span.start)
    return seen_repeats(span.source.sequence)[first : first + span.length]
