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

from kvcomm_vllm.scheduler.slots import slot_key, span_kind
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
    plan: Plan, tokens: np.ndarray, namespace: bytes, anchors: Callable[[str], int]
) -> list[Place]:
    """The place of each REUSE span: the nearest slot that has anchors, or where it begins.

    Args:
        anchors: how many a slot has, by its key.
    """
    found: list[Place] = []
    gap_start, before = 0, None
    for span in plan.spans:
        if before is not None and _goes_on(before, span):
            found.append(found[-1])
        else:
            first, kind = span.start - span.seam, span_kind(span)
            possible = []
            for at in (first + shift for shift in _SHIFTS):
                if gap_start <= at <= span.end:
                    agent_end = found[0].start if found else at
                    key = slot_key(tokens, namespace, agent_end, gap_start, at, kind)
                    possible.append(Place(key, at))
            known = [place for place in possible if anchors(place.key)]
            found.append((known or possible)[0])
        gap_start, before = span.end, span
    return found


def _goes_on(before: ReuseSpan, span: ReuseSpan) -> bool:
    """Whether both are parts of one text, with a few tokens between them that differ."""
    if before.source.sequence is not span.source.sequence:
        return False
    reached = before.source.sequence_start + before.end - before.source.prompt_start
    cut = span.source.sequence_start - reached
    return 0 <= cut <= CUT_TOKENS and span.start - span.seam - before.end <= CUT_TOKENS
