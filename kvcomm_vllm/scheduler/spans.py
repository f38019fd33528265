# SPDX-License-Identifier: Apache-2.0
"""Spans: how each run of a prompt's tokens gets its KV.

position   0 ....... local ...... s ........ e ...... s ....... e ........ N
treatment  [ LOCAL   ][ COMPUTE   ][ REUSE   ][COMPUTE ][ REUSE  ][ COMPUTE ]
            vLLM's     gap + seam   loaded     gap+seam  loaded    tail, by vLLM's
            own cache                                              own forward
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvcomm_vllm.scheduler.index import Sequence


class Treatment(enum.StrEnum):
    LOCAL = "local"
    REUSE = "reused"
    COMPUTE = "computed"


@dataclass(frozen=True, slots=True)
class Source:
    """A run of the prompt whose KV lies in pages: ``length`` tokens from ``prompt_start``.

    Args:
        blocks: page ids holding exactly this run; ``block_offset`` is its first token's place in
            the first page.
        same_context: everything before the run is equal, too, so its KV fits as it is: no seam, no
            rotation.
    """

    sequence: Sequence
    sequence_start: int
    prompt_start: int
    length: int
    blocks: list[int]
    block_offset: int
    same_context: bool

    @property
    def end(self) -> int:
        return self.prompt_start + self.length


@dataclass(frozen=True, slots=True)
class ReuseSpan:
    """Tokens ``start..end`` are loaded from ``source``; the ``seam`` tokens before ``start`` match,
    too, but are computed. ``entry``: where workers keep the correction of its slot, if it is warm.
    """

    start: int
    end: int
    seam: int
    source: Source
    entry: int | None = None

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Plan:
    """Spans of one admission of one request: LOCAL up to ``local``, then holes and REUSE spans,
    then the tail.

    Everything up to the last REUSE span's end is *external* for vLLM: loaded or computed before its
    forward.
    """

    local: int
    spans: tuple[ReuseSpan, ...]

    @property
    def end(self) -> int:
        return self.spans[-1].end

    @property
    def external_tokens(self) -> int:
        return self.end - self.local

    @property
    def reused_tokens(self) -> int:
        return sum(span.length for span in self.spans)

    @property
    def corrected_tokens(self) -> int:
        return sum(span.length for span in self.spans if span.entry is not None)

    @property
    def hole_tokens(self) -> int:
        return self.external_tokens - self.reused_tokens

    @property
    def seam_tokens(self) -> int:
        return sum(span.seam for span in self.spans)

    def holes(self) -> list[tuple[int, int]]:
        """The runs ``(start, end)`` between the REUSE spans, to be computed by the side forward."""
        starts = [self.local, *(span.end for span in self.spans)]
        return [
            (a, span.start) for a, span in zip(starts, self.spans, strict=False) if a < span.start
        ]

    def treatments(self, total: int) -> list[tuple[int, int, Treatment]]:
        """All spans of a prompt of ``total`` tokens in order, without empty ones."""
        spans = [(0, self.local, Treatment.LOCAL)]
        spans += [(start, end, Treatment.COMPUTE) for start, end in self.holes()]
        spans += [(span.start, span.end, Treatment.REUSE) for span in self.spans]
        spans += [(self.end, total, Treatment.COMPUTE)]
        return sorted(span for span in spans if span[0] < span[1])
