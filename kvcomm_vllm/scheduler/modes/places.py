# SPDX-License-Identifier: Apache-2.0
"""Places: in which slot each span of a plan stands, and where that slot begins.

A message may match some source a few tokens earlier or later than usual (its edge was tokenised in
another way, or the source had the same words before it), and a token that differs inside cuts it in
two. Both leave the slot what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvcomm_vllm.scheduler.modes.placeholders import slot_key, span_kind
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan

NEAR_TOKENS = 4  # a slot may begin so much earlier or later than its span
CUT_TOKENS = 8  # what may be different between two parts of one message
_SHIFTS = sorted(range(-NEAR_TOKENS, NEAR_TOKENS + 1), key=abs)


@dataclass(frozen=True, slots=True)
class Place:
    """A slot's key, and the position of its first token in this prompt."""

    key: str
    start: int


def places(
    plan: Plan, tokens: np.ndarray, namespace: bytes, known: Callable[[str], bool]
) -> list[Place]:
    """The place of each REUSE span: the nearest slot that has anchors, or where it begins.

    Args:
        known: whether a slot has anchors, by its key.
    """
    found: list[Place] = []
    gap_start, before = 0, None
    for span in plan.spans:
        if before is not None and _goes_on(before, span):
            found.append(found[-1])
        else:
            agent_end = found[0].start if found else None
            found.append(_nearest(span, agent_end, gap_start, tokens, namespace, known))
        gap_start, before = span.end, span
    return found


def _nearest(
    span: ReuseSpan,
    agent_end: int | None,
    gap_start: int,
    tokens: np.ndarray,
    namespace: bytes,
    known: Callable[[str], bool],
) -> Place:
    first, kind = span.start - span.seam, span_kind(span)

    def place(at: int) -> Place:
        end = at if agent_end is None else agent_end
        return Place(slot_key(tokens, namespace, end, gap_start, at, kind), at)

    near = (first + shift for shift in _SHIFTS if gap_start <= first + shift <= span.end)
    return next((p for p in map(place, near) if known(p.key)), None) or place(first)


def _goes_on(before: ReuseSpan, span: ReuseSpan) -> bool:
    """Whether both are parts of one text, from two sources or with a few tokens between them that
    differ.
    """
    if span.continues and span.start == before.end:
        return True
    if before.source.sequence is not span.source.sequence:
        return False
    reached = before.source.sequence_start + before.end - before.source.prompt_start
    cut = span.source.sequence_start - reached
    return 0 <= cut <= CUT_TOKENS and span.start - span.seam - before.end <= CUT_TOKENS
