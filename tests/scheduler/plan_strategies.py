# SPDX-License-Identifier: Apache-2.0
"""Random sources and limits for the tests of spans, planner and placeholders."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.cover import cover
from kvcomm_vllm.scheduler.index import Sequence
from kvcomm_vllm.scheduler.planner import Limits, UnseenShare, make_plan
from kvcomm_vllm.scheduler.spans import Plan, Source

SIZE = 4


def sequence(
    tokens: int = 400, prompt: int = 400, first_approximate: int | None = None
) -> Sequence:
    return Sequence(
        id=0,
        namespace=b"",
        tokens=np.arange(tokens, dtype=np.int32),
        block_hashes=[bytes([n]) for n in range(tokens // SIZE)],
        num_prompt_tokens=prompt,
        first_approximate=first_approximate,
        ready=True,
        owner="owner",
    )


def source(
    prompt_start: int,
    length: int,
    sequence_start: int = 0,
    same_context: bool = False,
    of: Sequence | None = None,
    lead: int = 0,
) -> Source:
    """Pages are numbered like the sequence's own, from 100."""
    first, last = sequence_start // SIZE, -(-(sequence_start + length) // SIZE)
    return Source(
        sequence=of or sequence(),
        sequence_start=sequence_start,
        prompt_start=prompt_start,
        length=length,
        blocks=list(range(100 + first, 100 + last)),
        block_offset=sequence_start % SIZE,
        same_context=same_context,
        lead=lead,
    )


def limits(
    seam_tokens: int = 4,
    min_span_tokens: int = 8,
    min_reuse_tokens: int = 8,
    min_reuse_share: float = 0.0,
    private_price: float = 0.0,
    max_unseen_share: float = 1.0,
    max_refresh_share: float = 0.0,
) -> Limits:
    return Limits(
        seam_tokens,
        seam_tokens,
        min_span_tokens,
        min_reuse_tokens,
        min_reuse_share,
        private_price,
        max_unseen_share,
        max_refresh_share,
    )


def plan_for(
    local: int,
    sources: list[Source],
    given: Limits,
    tail: int = 1,
    unseen: UnseenShare = lambda spans: 0.0,
) -> Plan | Reason:
    """The plan for a prompt that ends ``tail`` tokens behind the last source."""
    total = max((source.end for source in sources), default=local) + tail
    spans = cover(sources, given.seam_tokens, SIZE)
    return make_plan(local, spans, total, given, unseen, lambda span: 0.0)


@st.composite
def local_and_sources(draw: st.DrawFn) -> tuple[int, list[Source]]:
    """A local hit and sources behind it, in order and apart, as the index finds them."""
    local = position = SIZE * draw(st.integers(0, 10))
    found = []
    for _ in range(draw(st.integers(0, 6))):
        position += draw(st.integers(0, 30))
        length = draw(st.integers(1, 60))
        found.append(
            source(
                position,
                length,
                sequence_start=draw(st.integers(0, 300)),
                same_context=draw(st.booleans()),
                of=sequence(first_approximate=draw(st.none() | st.integers(0, 400))),
            )
        )
        position += length
    return local, found


any_limits = st.builds(
    Limits,
    seam_tokens=st.integers(0, 20),
    min_span_tokens=st.integers(1, 30),
    min_reuse_tokens=st.integers(1, 60),
    min_reuse_share=st.floats(0, 1),
    private_price=st.floats(0, 2),
    max_unseen_share=st.just(1.0),
    max_refresh_share=st.just(0.0),
)
