# SPDX-License-Identifier: Apache-2.0
"""Slots without markup: the same place in an agent's template gets the same key, whatever text
arrives there.

A slot is known by the COMPUTE text that leads to it. That text is hashed without its edge tokens,
since a neighbouring message may merge with them when the prompt is tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import xxhash

from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan

EDGE_TOKENS = 2
KEY_TOKENS = 64  # of the text before a slot; a template is told apart by less


def span_kind(span: ReuseSpan) -> str:
    """``output`` for text its source generated, ``prompt`` for text it was given."""
    source = span.source
    return "output" if source.sequence_start >= source.sequence.num_prompt_tokens else "prompt"


def slot_keys(plan: Plan, tokens: np.ndarray, namespace: bytes) -> list[str]:
    """One key per REUSE span: a hash chain over the text between the spans, in hexadecimal.

    LOCAL text counts as leading text of the first slot: it is the agent's own template.
    """
    chain = xxhash.xxh3_64(namespace)
    keys: list[str] = []
    position = 0
    for span in plan.spans:
        chain.update(_template_bytes(tokens[position : span.start - span.seam]))
        chain.update(span_kind(span).encode())
        keys.append(chain.hexdigest())
        position = span.end
    return keys


def _template_bytes(text: SequenceOf[int] | np.ndarray) -> bytes:
    inner = np.asarray(text, dtype=np.int32)[EDGE_TOKENS:-EDGE_TOKENS]
    return inner[-KEY_TOKENS:].tobytes() + b"|"
