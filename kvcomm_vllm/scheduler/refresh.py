# SPDX-License-Identifier: Apache-2.0
"""Refresh: tokens of reused text that are computed again, since an edit has moved their KV most.

These are few: tokens that repeated something in the context their KV saw and do not in this one, or
the other way around, and those that the next token will look at (see :mod:`repeats`). In an agent's
own text also the tokens right behind the edit, and a share of what has been copied for the longest
time, so that errors do not grow from edit to edit.
What was measured: docs/experiments/edits.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Listing
from dataclasses import replace
from functools import cached_property

import numpy as np

from kvcomm_vllm.scheduler.cover import true_runs
from kvcomm_vllm.scheduler.index import I32, Births
from kvcomm_vllm.scheduler.origin import ELSEWHERE, OWN, born, same_agent, saw
from kvcomm_vllm.scheduler.repeats import PHRASE, Bools, Marks, precedents, repeats, with_the_next
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan, Source, texts

# A load of fewer tokens is not worth an operation: they are computed with their neighbours.
LEAST_LOAD = 4
# The tokens right behind an edit of an agent's prompt; its text goes on from what is not there.
BEHIND_EDIT = 32
# Within so many, single words that are said for the first time now, or not any more, count, too.
WORDS_BEHIND_EDIT = 512
# Text that was computed within so many last turns is not computed again for its age.
YOUNG_TURNS = 8
# At most so much of an agent's prompt is, behind one edit.
ROLLING_SHARE = 0.02


class Refresh:
    """What of one prompt is to be computed again.

    Args:
        prompt: token ids, int32 ``[n]``.
        trusted: its sender may learn which words stand in the context that reused KV saw: from how
            much is computed again he could find them one by one.
    """

    def __init__(self, prompt: I32, trusted: bool = True) -> None:
        self._prompt, self._trusted = prompt, trusted
        self._known: dict[tuple[int, int], list[tuple[int, Bools]]] = {}

    @cached_property
    def repeats(self) -> Marks:
        """What of the prompt is repeated in it."""
        return repeats(self._prompt)

    @cached_property
    def _precedents(self) -> Bools:
        return precedents(self._prompt)

    def stale(self, source: Source) -> Bools:
        """Tokens of a source whose KV does not fit their context in the prompt: bool ``[length]``.

        KV of the same context fits as far as it is exact. Of a part of a source that was asked
        about before, what was said of the whole.
        """
        known = self._known.setdefault((source.sequence.id, source.place_of(0)), [])
        for at, whole in known:
            first = source.prompt_start - at
            if 0 <= first <= len(whole) - source.length:
                return whole[first : first + source.length]
        start, end = source.prompt_start, source.end
        changed = self._changed(source, start, end)
        stale: Bools = (changed & PHRASE) != 0
        if stale.any():  # an edit that moves nothing else moves these little
            stale |= self._precedents[start:end]
        # of text that an agent brings with it from elsewhere, most words would be due
        stale |= (self.born(source) != ELSEWHERE) & self._behind_edit(changed, source.lead)
        if source.same_context:
            stale[: max(0, source.exact_end - start)] = False
        known.append((start, stale))
        return stale

    def _behind_edit(self, changed: Marks, lead: int) -> Bools:
        """What is stale of text that stayed where other text of the same prompt did not: its first
        tokens, and near them words said for the first time now or not any more, and the token
        behind each.

        Args:
            lead: how many tokens right before have stayed, too.
        """
        words = (changed != 0) & self._trusted
        words[max(0, WORDS_BEHIND_EDIT - lead) :] = False
        stale = with_the_next(words)
        stale[: max(0, BEHIND_EDIT - lead)] = True
        return stale

    def _changed(self, source: Source, start: int, end: int) -> Marks:
        """What is repeated here and was not where the KV was computed, or the other way around."""
        changed: Marks = saw(source, start, end) ^ self.repeats[start:end]
        return changed

    def born(self, source: Source) -> Births:
        """In which earlier prompt of the same agent each token's KV was computed: int32
        ``[length]``.
        """
        return born(source, self._prompt, source.prompt_start, source.end)

    def stale_share(self, text: Listing[ReuseSpan]) -> float:
        """The share of the tokens of one text in common that would be computed again."""
        kept = sum(end - start for start, end in self._kept(text))
        return 1 - kept / (text[-1].end - text[0].start)

    def cut(self, plan: Plan, block_size: int) -> Plan:
        """The plan with holes for what is to be computed again."""
        spans: list[ReuseSpan] = []
        refreshed: list[tuple[int, int]] = []
        oldest = self._oldest(plan.spans)
        for text in texts(plan.spans):
            kept = self._kept(text, oldest) or self._kept(text)
            if not kept:
                continue
            spans += _parts(text, kept, block_size)
            ends = [*(start for start, _ in kept[1:]), text[-1].end]
            refreshed += ((a, b) for (_, a), b in zip(kept, ends, strict=True) if a < b)
        return Plan(plan.local, tuple(spans), tuple(refreshed))

    def _oldest(self, spans: Listing[ReuseSpan]) -> Bools:
        """Of the agent's own copies those that are computed again for their age, by positions: of
        the oldest as many as are stale for a phrase, up to a share of the prompt.

        Each turn computes something that stays, so turns are counted by what is there of them.
        """
        own = [
            span
            for span in spans
            if same_agent(span.source.sequence.tokens, self._prompt)
            and not span.source.same_context
        ]
        births = np.full(len(self._prompt), OWN, np.int32)
        for span in own:
            found = born(span.source, self._prompt, span.start, span.end)
            births[span.start : span.end] = np.where(self._stale_of(span), OWN, found)
        chosen = np.zeros(len(births), np.bool_)
        turns = np.unique(births[births < OWN])
        if len(turns) <= YOUNG_TURNS:
            return chosen
        births[births >= turns[-YOUNG_TURNS]] = OWN
        changed = (self._changed(span.source, span.start, span.end) for span in own)
        phrases = sum(int(np.count_nonzero(marks & PHRASE)) for marks in changed)
        count = min(phrases, int(ROLLING_SHARE * len(births)))
        first = np.argsort(births, kind="stable")[:count]
        chosen[first[births[first] < OWN]] = True
        return chosen

    def _kept(self, text: Listing[ReuseSpan], oldest: Bools | None = None) -> list[tuple[int, int]]:
        """What of a text is loaded, by positions: its runs that are worth an operation."""
        first, end = text[0].start, text[-1].end
        again = np.concatenate([self._stale_of(span) for span in text])
        if oldest is not None:
            again |= oldest[first:end]
        runs = ((first + start, first + stop) for start, stop in true_runs(~again))
        return [(start, stop) for start, stop in runs if stop - start >= LEAST_LOAD]

    def _stale_of(self, span: ReuseSpan) -> Bools:
        return self.stale(span.source)[span.start - span.source.prompt_start :]


def _parts(
    text: Listing[ReuseSpan], kept: list[tuple[int, int]], block_size: int
) -> Iterator[ReuseSpan]:
    """The parts of a text's spans that lie in its kept runs; the seam reaches to the first."""
    seam = kept[0][0] - text[0].start + text[0].seam
    for span in text:
        for first, stop in kept:
            start, end = max(first, span.start), min(stop, span.end)
            if start < end:
                source = span.source.part(start, end, block_size)
                yield replace(span, start=start, end=end, seam=seam, source=source)
                seam = 0
