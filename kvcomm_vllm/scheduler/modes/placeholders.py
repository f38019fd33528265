# SPDX-License-Identifier: Apache-2.0
"""Slots without markup: the same place in an agent's template gets the same key, whatever text
arrives there.

A slot is known by its agent (how the prompt begins) and by the COMPUTE text that leads to it. That
text counts without its edge tokens, since a neighbouring message may merge with them when the
prompt is tokenised.
"""

from __future__ import annotations

import numpy as np
import xxhash

from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan

EDGE_TOKENS = 2
# The prompt's first ones tell agents apart; more would reach into what they are told.
LEAD_TOKENS = 32
# Of the text before a slot only the last ones are surely template: a source's last partial page is
# gone with its request, so the tail of one message may be computed in front of "the other said".
GAP_TOKENS = 4


def span_kind(span: ReuseSpan) -> str:
    """``output`` for text its source generated, ``prompt`` for text it was given."""
    source = span.source
    return "output" if source.sequence_start >= source.sequence.num_prompt_tokens else "prompt"


def slot_keys(plan: Plan, tokens: np.ndarray, namespace: bytes) -> list[str]:
    """One key per REUSE span, in hexadecimal: whose prompt it is, what leads to the span, and where
    its text comes from.

    A key does not depend on other slots, so a message too short to be reused changes no other key.
    Slots with the same lead in one prompt ("Passage:") are one slot.
    """
    keys: list[str] = []
    gap_start, agent_end = 0, None
    for span in plan.spans:
        start = span.start - span.seam
        agent_end = start if agent_end is None else agent_end
        keys.append(slot_key(tokens, namespace, agent_end, gap_start, start, span_kind(span)))
        gap_start = span.end
    return keys


def slot_key(
    tokens: np.ndarray, namespace: bytes, agent_end: int, gap_start: int, start: int, kind: str
) -> str:
    """The key of the slot that begins at ``start``, in hexadecimal.

    Args:
        agent_end: where the prompt's first slot begins; ``gap_start``: end of the span before.
    """
    agent = tokens[: max(0, agent_end - EDGE_TOKENS)][:LEAD_TOKENS]
    lead = tokens[gap_start:start][EDGE_TOKENS:-EDGE_TOKENS][-GAP_TOKENS:]
    text = b"|".join((namespace, _bytes(agent), _bytes(lead), kind.encode()))
    return xxhash.xxh3_64_hexdigest(text)


def _bytes(tokens: np.ndarray) -> bytes:
    return np.asarray(tokens, dtype=np.int32).tobytes()
