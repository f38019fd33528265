# SPDX-License-Identifier: Apache-2.0
"""The cover: from which source each token of a prompt is taken, token by token the one that fits
best.

Sources overlap: the same text lies in many requests' pages, exact in some, copied in others. A
source counts from behind its seam on, the first tokens of the text that it has in common with the
prompt; where one source gives way to another inside that text, no seam is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Listing
from itertools import pairwise
from typing import Protocol, TypeAlias

import numpy as np

from kvcomm_vllm.scheduler.index import Births
from kvcomm_vllm.scheduler.repeats import Bools
from kvcomm_vllm.scheduler.spans import ReuseSpan, Source

NOBODY = -1
Rank: TypeAlias = tuple[bool, bool, int, int, bool, int, int]


class Fit(Protocol):
    """How well the KV of sources fits a prompt, token by token."""

    def stale(self, source: Source) -> Bools:
        """Whose KV would have to be computed again: bool ``[length]``."""

    def born(self, source: Source) -> Births:
        """The larger, the later was KV computed in the agent's own session: int32 ``[length]``."""


class AsItIs:
    """All KV fits alike."""

    def stale(self, source: Source) -> Bools:
        return np.zeros(source.length, np.bool_)

    def born(self, source: Source) -> Births:
        return np.zeros(source.length, np.int32)


AS_IT_IS = AsItIs()


def cover(
    sources: Listing[Source], seam: int, block_size: int, fit: Fit = AS_IT_IS
) -> list[ReuseSpan]:
    """Spans in the order of the prompt, without overlap; those that touch each other share a seam.

    Exact KV of the same context comes first. Then, of KV that is not stale, what was computed last
    in the agent's own session, and of that the youngest generation: exact KV that is moved is one
    copy away from exact, as is the request's own that was moved before. Of equal ones one of the
    same context comes first, then the one that is usable for the longest stretch, then the newest.

    Args:
        seam: tokens computed at the beginning of each common text.
        fit: see :class:`~kvcomm_vllm.scheduler.refresh.Refresh`.
    """
    if not sources:
        return []
    total = max(source.end for source in sources)
    owner = np.full(total + 1, NOBODY, np.int64)
    for _, start, end, number in sorted(_strokes(sources, seam, fit)):
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


def _strokes(sources: Listing[Source], seam: int, fit: Fit) -> Iterator[tuple[Rank, int, int, int]]:
    """(rank, start, end, number of the source) of what is painted, the best last."""
    for number, source in enumerate(sources):
        first, same = source.prompt_start, source.same_context
        usable = first if same else first + max(0, seam - source.lead)
        fresh, births = ~fit.stale(source), fit.born(source)
        changes = np.flatnonzero(np.diff(fresh) | (np.diff(births) != 0)) + 1 + first
        cuts = {usable, source.exact_end, source.end, *changes.tolist()}
        ordered = sorted(cut for cut in cuts if usable <= cut <= source.end)
        for start, end in pairwise(ordered):
            exact = start < source.exact_end
            generation = (0 if exact else source.sequence.generation or 1) + (not same)
            at = start - first
            rank = (
                bool(fresh[at]),
                exact and same,
                int(births[at]),
                -generation,
                same,
                source.end - usable,
                source.sequence.id,
            )
            yield rank, start, end, number


def true_runs(marks: Bools) -> list[tuple[int, int]]:
    """The runs ``(start, stop)`` of tokens that are marked, in order."""
    edges = np.flatnonzero(np.diff(marks, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
