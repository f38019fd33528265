# SPDX-License-Identifier: Apache-2.0
"""The cover: from which source each token of a prompt is taken, token by token the most exact one.

Sources overlap: the same text lies in many requests' pages, exact in some, copied in others. A
source counts from behind its seam on, the first tokens of the text that it has in common with the
prompt; where one source gives way to another inside that text, no seam is needed.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing

import numpy as np

from kvcomm_vllm.scheduler.spans import ReuseSpan, Source

NOBODY = -1


def cover(sources: Listing[Source], seam: int, block_size: int) -> list[ReuseSpan]:
    """Spans in the order of the prompt, without overlap; those that touch each other share a seam.

    Whichever makes the youngest generation of KV at a token is taken: exact KV that is moved is one
    copy away from exact, as is the request's own that was moved before. Of equal ones one of the
    same context comes first, then the one that is usable for the longest stretch, then the newest.

    Args:
        seam: tokens computed at the beginning of each common text.
    """
    if not sources:
        return []
    total = max(source.end for source in sources)
    owner = np.full(total + 1, NOBODY, np.int64)
    for _, start, end, number in sorted(_strokes(sources, seam)):
        owner[start:end] = number
    cuts = np.flatnonzero(np.diff(owner, prepend=NOBODY))
    spans: list[ReuseSpan] = []
    for start, end in zip(cuts.tolist(), cuts[1:].tolist(), strict=False):
        if owner[start] != NOBODY:
            before = spans[-1].end if spans else 0
            source = sources[owner[start]]
            begin = max(before, source.prompt_start, start - seam)
            spans.append(ReuseSpan(start, end, start - begin, source.part(begin, end, block_size)))
    return spans


def _strokes(
    sources: Listing[Source], seam: int
) -> list[tuple[tuple[int, bool, int, int], int, int, int]]:
    """(rank, start, end, number of the source) of what is painted, the best last."""
    found = []
    for number, source in enumerate(sources):
        usable = source.prompt_start
        if not source.same_context:
            usable += max(0, seam - source.lead)
        parts = [
            (0, usable, source.exact_end),
            (source.sequence.generation or 1, max(usable, source.exact_end), source.end),
        ]
        for copies, start, end in parts:
            if start < end:
                generation = copies + (not source.same_context)
                rank = (-generation, source.same_context, end - usable, source.sequence.id)
                found.append((rank, start, end, number))
    return found
