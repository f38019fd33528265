# SPDX-License-Identifier: Apache-2.0
"""How far a match may reach: to exact KV, and to borders while others' text is to stay secret.

What is reused shows in reports and in time. If a match ended at the very token that differs, a
stranger could guess text behind a beginning that he knows token by token: each right guess would
reuse one token more. Between two borders all tokens have to be right at once.

A sequence is cut into windows from its start, and anew from where its output begins; the last one
of each part takes what is left over, so that none is shorter than a window (but for parts that are
shorter themselves).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcomm_vllm.scheduler.index.sequence import Sequence

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of each sequence its tokens: of the prompt, in all, with exact KV; int64 ``[n]``."""

    prompt: I64
    total: I64
    exact: I64

    @classmethod
    def of(cls, sequences: Iterable[Sequence]) -> Lengths:
        found = [(s.num_prompt_tokens, len(s.tokens), s.exact_tokens) for s in sequences]
        return cls(*np.array(found, np.int64).reshape(-1, 3).T)

    def select(self, which: NDArray[np.integer] | NDArray[np.bool_]) -> Lengths:
        """Those given, in the given order."""
        return Lengths(self.prompt[which], self.total[which], self.exact[which])


@dataclass(frozen=True, slots=True)
class Borders:
    """Borders of sequences, elementwise for arrays of positions in them.

    Args:
        window: tokens between two borders at least.
    """

    window: int
    lengths: Lengths

    def floor(self, position: I64) -> I64:
        """The last border at or before each position."""
        begin, length = self._part(position >= self._prompt)
        inside = position - begin
        cut = np.minimum(inside // self.window * self.window, self._last_inner(length))
        found: I64 = begin + np.where(inside >= length, length, cut)
        return found

    def ceil(self, position: I64) -> I64:
        """The first border at or behind each position."""
        begin, length = self._part(position > self._prompt)
        cut = -(-(position - begin) // self.window) * self.window
        found: I64 = begin + np.where(cut > self._last_inner(length), length, cut)
        return found

    @property
    def _prompt(self) -> I64:
        return np.minimum(self.lengths.prompt, self.lengths.total)

    def _part(self, output: NDArray[np.bool_]) -> tuple[I64, I64]:
        """Where each sequence's output or prompt begins, and its length."""
        prompt = self._prompt
        return np.where(output, prompt, 0), np.where(output, self.lengths.total - prompt, prompt)

    def _last_inner(self, length: I64) -> I64:
        return np.maximum(length // self.window - 1, 0) * self.window


@dataclass(frozen=True, slots=True)
class Reach:
    """How much of a run of equal tokens may be used.

    Args:
        exact: only what has exact KV.
        secret: a run may begin and end at borders alone.
    """

    exact: bool = False
    secret: bool = False

    def cut(
        self, lengths: Lengths, window: int, diagonal: I64, begin: I64, end: I64
    ) -> tuple[I64, I64]:
        """Begin and end of the usable part of each run ``begin..end`` of the prompt; nothing is
        left where they cross.

        Args:
            diagonal: prompt position of the first token of each run's sequence.
        """
        if self.exact:
            end = np.minimum(end, diagonal + lengths.exact)
        if self.secret:
            borders = Borders(window, lengths)
            begin = diagonal + borders.ceil(begin - diagonal)
            end = diagonal + borders.floor(np.maximum(end - diagonal, 0))
        return begin, end


WHOLE = Reach()
