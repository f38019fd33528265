# SPDX-License-Identifier: Apache-2.0
"""Placeholders without markup: the same place in an agent's template gets the same key, whatever
text arrives there.

A placeholder is known by its agent (how the prompt begins) and by the COMPUTE text that leads to
it. That text counts without its edge tokens, since a neighbouring message may merge with them when
the prompt is tokenised.

A message may match some source a few tokens earlier or later than usual (its edge was tokenised in
another way, or the source had the same words before it), and a token that differs inside cuts it in
two. Both leave the placeholder what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xxhash

from kvcomm_vllm.scheduler.origin import LEAD_TOKENS
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan

EDGE_TOKENS = 2
# Of the text before a placeholder only the last ones are surely template: a source's last page may
# be gone, so the tail of one message may be computed in front of "the other said".
GAP_TOKENS = 4
NEAR_TOKENS = 4  # a placeholder may begin so much earlier or later than its span
CUT_TOKENS = 8  # what may be different between two parts of one message
_SHIFTS = sorted(range(-NEAR_TOKENS, NEAR_TOKENS + 1), key=abs)


@dataclass(frozen=True, slots=True)
class Placeholder:
    """Where a template's text changes: its key, and its first token's position in this prompt."""

    key: str
    start: int


def span_kind(span: ReuseSpan) -> str:
    """``output`` for text its source generated, ``prompt`` for text it was given."""
    source = span.source
    return "output" if source.sequence_start >= source.sequence.num_prompt_tokens else "prompt"


def placeholder_keys(plan: Plan, tokens: np.ndarray, namespace: bytes) -> list[str]:
    """One key per REUSE span, in hexadecimal: whose prompt it is, what leads to the span, and where
    its text comes from.

    A key does not depend on other placeholders, so a message too short to be reused changes no
    other key. Those with the same lead in one prompt ("Passage:") are one placeholder.
    """
    keys: list[str] = []
    gap_start, agent_end = 0, None
    for span in plan.spans:
        start = span.start - span.seam
        agent_end = start if agent_end is None else agent_end
        keys.append(
            placeholder_key(tokens, namespace, agent_end, gap_start, start, span_kind(span))
        )
        gap_start = span.end
    return keys


def placeholder_key(
    tokens: np.ndarray, namespace: bytes, agent_end: int, gap_start: int, start: int, kind: str
) -> str:
    """The key of the placeholder that begins at ``start``, in hexadecimal.

    Args:
        agent_end: where the prompt's first one begins; ``gap_start``: end of the span before.
    """
    agent = tokens[: max(0, agent_end - EDGE_TOKENS)][:LEAD_TOKENS]
    lead = tokens[gap_start:start][EDGE_TOKENS:-EDGE_TOKENS][-GAP_TOKENS:]
    text = b"|".join((namespace, _bytes(agent), _bytes(lead), kind.encode()))
    return xxhash.xxh3_64_hexdigest(text)


def placeholders(
    plan: Plan, tokens: np.ndarray, namespace: bytes, known: Callable[[str], bool]
) -> list[Placeholder]:
    """That of each REUSE span: the nearest one that has anchors, or the one where it begins.

    Args:
        known: whether a placeholder has anchors, by its key.
    """
    found: list[Placeholder] = []
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
) -> Placeholder:
    first, kind = span.start - span.seam, span_kind(span)

    def one(at: int) -> Placeholder:
        end = at if agent_end is None else agent_end
        return Placeholder(placeholder_key(tokens, namespace, end, gap_start, at, kind), at)

    near = (first + shift for shift in _SHIFTS if gap_start <= first + shift <= span.end)
    return next((p for p in map(one, near) if known(p.key)), None) or one(first)


def _goes_on(before: ReuseSpan, span: ReuseSpan) -> bool:
    """Whether both are parts of one text, from two sources or with a few tokens between them that
    differ.
    """
    if span.goes_on_from(before):
        return True
    if before.source.sequence is not span.source.sequence:
        return False
    cut = span.source.sequence_start - before.source.place_of(before.end)
    return 0 <= cut <= CUT_TOKENS and span.start - span.seam - before.end <= CUT_TOKENS


def _bytes(tokens: np.ndarray) -> bytes:
    return np.asarray(tokens, dtype=np.int32).tobytes()
