# SPDX-License-Identifier: Apache-2.0
"""Spans: how each run of a prompt's tokens gets its KV.

position   0 ....... local ...... s ........ e ...... s ....... e ........ N
treatment  [ LOCAL   ][ COMPUTE   ][ REUSE   ][COMPUTE ][ REUSE  ][ COMPUTE ]
            vLLM's     gap + seam   loaded     gap+seam  loaded    tail, by vLLM's
            own cache                                              own forward
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from kvcomm_vllm.messages import AnchorRows
from kvcomm_vllm.scheduler.index import Sequence


class Treatment(enum.StrEnum):
    """What happens to the KV of a span's tokens; labels of reports and of a metric."""

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
        lead: how many tokens right before the run are equal in prompt and sequence, too.
    """

    sequence: Sequence
    sequence_start: int
    prompt_start: int
    length: int
    blocks: list[int]
    block_offset: int
    same_context: bool
    lead: int = 0

    @property
    def end(self) -> int:
        return self.prompt_start + self.length

    @property
    def exact_end(self) -> int:
        """Up to which prompt position its KV is exact."""
        return self.end - self.approximate_tokens

    def place_of(self, position: int) -> int:
        """Where the token at this prompt position stands in the sequence."""
        return self.sequence_start + position - self.prompt_start

    def part(self, start: int, end: int, block_size: int) -> Source:
        """The same for the prompt positions ``start..end`` alone."""
        skip = start - self.prompt_start
        first, offset = divmod(self.block_offset + skip, block_size)
        pages = -(-(offset + end - start) // block_size)
        return replace(
            self,
            sequence_start=self.place_of(start),
            prompt_start=start,
            length=end - start,
            blocks=self.blocks[first : first + pages],
            block_offset=offset,
            lead=self.lead + skip,
        )

    @property
    def approximate_tokens(self) -> int:
        """Tokens at its end whose KV is itself approximate."""
        behind = self.sequence_start + self.length - self.sequence.exact_tokens
        return min(self.length, max(0, behind))


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mode ``paper``: a span's correction, and the text behind it that is estimated as well.

    Args:
        anchors: those at least as long as the span.
        start, stop: positions of the estimated text; equal if there is none.
        behind_end: end of all text behind the span, with which that of the anchors is aligned.
        known: per anchor, how many of the last tokens before ``behind_end`` are its own, too.
    """

    anchors: tuple[AnchorRows, ...]
    start: int
    stop: int
    behind_end: int
    known: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReuseSpan:
    """Tokens ``start..end`` are loaded from ``source``; the ``seam`` tokens before ``start`` match,
    too, but are computed. ``entry``: where workers keep the correction of its placeholder, if it is
    warm, and ``mapped`` whether that is more than means; ``placeholder_start``: position of that
    placeholder's first token; ``estimate``: the correction of mode ``paper``.
    """

    start: int
    end: int
    seam: int
    source: Source
    entry: int | None = None
    mapped: bool = True
    placeholder_start: int = 0
    estimate: Estimate | None = None

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def continues(self) -> bool:
        """Whether the text before it is the same, too: another source gave way to this one."""
        return self.seam == 0 and self.source.lead > 0

    def touches(self, before: ReuseSpan) -> bool:
        """Whether it begins where another one ends."""
        return before.end == self.start

    def goes_on_from(self, before: ReuseSpan) -> bool:
        """Whether both are parts of one text in common."""
        return self.continues and self.touches(before)


def grouped(
    spans: Iterable[ReuseSpan], together: Callable[[ReuseSpan, ReuseSpan], bool]
) -> list[list[ReuseSpan]]:
    """Spans in order, those in one list of which each is ``together`` with the one before it."""
    found: list[list[ReuseSpan]] = []
    for span in spans:
        if found and together(span, found[-1][-1]):
            found[-1].append(span)
        else:
            found.append([span])
    return found


def texts(spans: Iterable[ReuseSpan]) -> list[list[ReuseSpan]]:
    """Spans by the texts in common that they are parts of, in order."""
    return grouped(spans, ReuseSpan.goes_on_from)


@dataclass(frozen=True, slots=True)
class Plan:
    """Spans of one admission of one request: LOCAL up to ``local``, then holes and REUSE spans,
    then the tail. ``refreshed``: what of reusable text is computed again, since an edit has moved
    its KV.

    Everything up to the end of what is loaded is *external* for vLLM: loaded or computed before its
    forward.
    """

    local: int
    spans: tuple[ReuseSpan, ...]
    refreshed: tuple[tuple[int, int], ...] = ()

    def loaded(self) -> list[tuple[int, int]]:
        """Everything that is loaded, in order: the REUSE spans, and what is estimated behind."""
        loaded = []
        for span in self.spans:
            loaded.append((span.start, span.end))
            if span.estimate is not None and span.estimate.start < span.estimate.stop:
                loaded.append((span.estimate.start, span.estimate.stop))
        return loaded

    @property
    def end(self) -> int:
        return self.loaded()[-1][1]

    @property
    def external_tokens(self) -> int:
        return self.end - self.local

    @property
    def reused_tokens(self) -> int:
        return sum(end - start for start, end in self.loaded())

    @property
    def corrected_tokens(self) -> int:
        corrected = 0
        for span in self.spans:
            if span.entry is not None or span.estimate is not None:
                corrected += span.length
            if span.estimate is not None:
                corrected += span.estimate.stop - span.estimate.start
        return corrected

    @property
    def tokens_from_approximate(self) -> int:
        """Reused tokens whose source is itself approximate."""
        return sum(min(span.length, span.source.approximate_tokens) for span in self.spans)

    @property
    def hole_tokens(self) -> int:
        return self.external_tokens - self.reused_tokens

    @property
    def seam_tokens(self) -> int:
        return sum(span.seam for span in self.spans)

    @property
    def refreshed_tokens(self) -> int:
        return sum(end - start for start, end in self.refreshed)

    @property
    def gap_tokens(self) -> int:
        """Those of holes that are neither seams nor refreshed."""
        refreshed = sum(end - start for start, end in self.refreshed if end < self.end)
        return self.hole_tokens - self.seam_tokens - refreshed

    def holes(self) -> list[tuple[int, int]]:
        """The stretches ``(start, end)`` between what is loaded, computed by the side forward."""
        loaded = self.loaded()
        starts = [self.local, *(end for _, end in loaded)]
        return [(a, start) for a, (start, _) in zip(starts, loaded, strict=False) if a < start]

    def treatments(self, total: int) -> list[tuple[int, int, Treatment]]:
        """All spans of a prompt of ``total`` tokens in order, without empty ones."""
        spans = [(0, self.local, Treatment.LOCAL)]
        spans += [(start, end, Treatment.COMPUTE) for start, end in self.holes()]
        spans += [(start, end, Treatment.REUSE) for start, end in self.loaded()]
        spans += [(self.end, total, Treatment.COMPUTE)]
        return sorted(span for span in spans if span[0] < span[1])
