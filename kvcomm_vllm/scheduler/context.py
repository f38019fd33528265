# SPDX-License-Identifier: Apache-2.0
"""Context: how much of the text before a span its source had in view when its KV was computed.

KV takes notes of what stands before it. A document behind another agent's instructions has seen
nearly all it stands behind now; the twentieth of twenty messages that were computed apart has seen
next to nothing, and answers that build on its KV go astray, however long its seam is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from kvcomm_vllm.scheduler.index import I32, RollingHash
from kvcomm_vllm.scheduler.spans import ReuseSpan, Source

GRAM = 8  # text in common counts from so many tokens on


class Context:
    """What stands before each token of one prompt.

    Args:
        prompt: token ids, int32 ``[n]``.
        borders: None to look for text in common at any place; else in whole windows of so many
            tokens of each sequence alone, which says nothing of single tokens.
    """

    def __init__(self, prompt: I32, borders: int | None) -> None:
        self._size, self._stride = (borders, borders) if borders else (GRAM, 1)
        self._hashing = RollingHash(self._size)
        self._distinct, self._which = np.unique(self._hashing.grams(prompt), return_inverse=True)
        self._known: dict[tuple[int, int, int], int] = {}

    def unseen_share(self, spans: Iterable[ReuseSpan]) -> float:
        """The share of their new context that the sources of ``spans`` never saw: the mean over all
        tokens of the spans.
        """
        unseen = tokens = 0.0
        for span in spans:
            # of a token at position t it is unseen / t; summed over the span
            unseen += self._unseen(span.source) * math.log(span.end / max(span.start, 1))
            tokens += span.length
        return unseen / tokens

    def _unseen(self, source: Source) -> int:
        """Tokens before the text in common that were not before it when its KV was computed."""
        if source.same_context:
            return 0
        at, behind = source.prompt_start - source.lead, source.sequence_start - source.lead
        key = (source.sequence.id, behind, at)
        if key not in self._known:
            self._known[key] = at - self._seen(source.sequence.tokens[:behind], at)
        return self._known[key]

    def _seen(self, earlier: I32, before: int) -> int:
        """Of the first ``before`` tokens of the prompt, those that ``earlier`` has as well."""
        known = np.isin(self._distinct, self._hashing.grams(earlier)[:: self._stride])
        starts = np.flatnonzero(known[self._which[: max(0, before - self._size + 1)]])
        steps = np.zeros(before + 1, np.int64)
        np.add.at(steps, starts, 1)
        np.add.at(steps, starts + self._size, -1)
        return int(np.count_nonzero(np.cumsum(steps)))
