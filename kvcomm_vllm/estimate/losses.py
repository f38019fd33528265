# SPDX-License-Identifier: Apache-2.0
"""Losses: why each computed token of a prompt is computed."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcomm_vllm.estimate.copies import Copy, copies
from kvcomm_vllm.estimate.renderings import Rendering
from kvcomm_vllm.estimate.seen import Seen
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.half import SchedulerHalf
from kvcomm_vllm.scheduler.index import I32, Match
from kvcomm_vllm.scheduler.near import LEAST_TOKENS
from kvcomm_vllm.scheduler.state import RequestState
from kvcomm_vllm.wording import Explained

Bools = NDArray[np.bool_]
REUSED = -1  # among numbers of words: no loss


class Part(Explained):
    """Why a part of a prompt is computed, beside the reasons that concern a whole request."""

    NEW = ("new", "Nobody has sent it before, or not in one piece of min_span_tokens or more.")
    SEAM = ("seam", "First tokens of reused text (seam_tokens), computed so that the rest fits.")
    REFRESHED = ("refreshed", "Reused text whose KV an edit has moved: computed again.")
    RE_ENCODED = (
        "re_encoded",
        "Shared text in another rendering: other tokens, nothing to reuse.",
    )
    SIMILAR = ("similar", "Much like stored text, but edited, or made from the same parts.")
    NO_SALT = (
        "no_cache_salt",
        "Shared, but requests without cache_salt match in whole windows alone: give each tenant "
        "one.",
    )
    LEFT_OUT = (
        "left_out",
        "Shared, but too short behind its seam, out of its context, or not worth what it makes "
        "private.",
    )


EXPLANATIONS: dict[str, str] = {word.value: word.explanation for word in (*Part, *Reason)}


def explanation(word: str) -> str:
    """What a word of :class:`Part` or :class:`Reason` means."""
    return EXPLANATIONS[word]


@dataclass(frozen=True)
class Loss:
    """``start..end`` of a prompt is computed, for the reason ``why``.

    Args:
        copy: of text that is like stored text, which one.
        rendering: what was done to it, where that is known.
    """

    start: int
    end: int
    why: str
    copy: Copy | None = None
    rendering: Rendering | None = None

    @property
    def name(self) -> str:
        """What this piece is called in a picture."""
        return self.rendering.name if self.rendering else str(self.why)

    @property
    def tokens(self) -> int:
        return self.end - self.start


class Losses:
    """Explains what the scheduler half has decided, between its decision and the admission.

    Args:
        explain: whether near copies are looked for.
    """

    def __init__(self, half: SchedulerHalf, explain: bool) -> None:
        self.half = half
        self.explain = explain
        self.seen = Seen(half.config, half.block_size)

    def of(self, state: RequestState, local: int) -> list[Loss]:
        """All losses of a prompt in order; together with its hits they are all of it."""
        tokens = state.tokens()
        if state.off is not None or state.limits is None:
            return _runs(np.full(len(tokens), 0), [str(state.off)], local)
        words: list[str] = [*Part, Reason.SOURCE_EVICTED, *state.declined]
        code = {word: number for number, word in enumerate(words)}
        evicted = code[Reason.SOURCE_EVICTED]
        reason = Part.LEFT_OUT if state.plan else next(iter(state.declined), Part.LEFT_OUT)
        why = np.full(len(tokens), code[Part.NEW], np.int64)
        least = state.limits.min_span_tokens
        _mark(why, self.seen.find(state.namespace, tokens, local, least), evicted)
        whole = self._whole(state, local)
        _mark(why, whole, code[Part.LEFT_OUT if state.trusted else Part.NO_SALT])
        _mark(why, state.matches, evicted)
        for match in state.matches:
            for source in self.half.pages.sources(match, tokens):
                why[source.prompt_start : source.end] = code[reason]
        for span in state.plan.spans if state.plan else ():
            why[span.start - span.seam : span.start] = code[Part.SEAM]
            why[span.start : span.end] = REUSED
        for start, end in state.plan.refreshed if state.plan else ():
            why[start:end] = code[Part.REFRESHED]
        found = self._near(state, tokens, local, why == code[Part.NEW])
        for number, copy in enumerate(found, len(words)):
            why[copy.start : copy.end] = number  # what it is called is for who can read
        words += [Part.SIMILAR] * len(found)
        return _runs(why, words, local, found)

    def _whole(self, state: RequestState, local: int) -> list[Match]:
        """Everything of the prompt that any request of its tenant holds."""
        assert state.limits is not None
        least = min(state.limits.min_span_tokens, LEAST_TOKENS)
        tokens = state.tokens()[:-1]
        return self.half.store.index.find(state.namespace, tokens, local, least, lambda s: s.ready)

    def _near(self, state: RequestState, tokens: I32, local: int, new: Bools) -> list[Copy]:
        if not self.explain or np.count_nonzero(new[local:]) < LEAST_TOKENS:
            return []
        new[:local] = False
        return copies(tokens, ~new, list(self.half.store.index.recent(state.namespace)))


def _mark(why: NDArray[np.int64], matches: list[Match], code: int) -> None:
    for match in matches:
        why[match.prompt_start : match.prompt_end] = code


def _runs(
    why: NDArray[np.int64], words: list[str], local: int, found: Listing[Copy] = ()
) -> list[Loss]:
    """Runs of equal words from ``local`` on; the last words stand for the copies ``found``."""
    cuts = np.flatnonzero(np.diff(why[local:])) + 1 + local
    starts = [local, *cuts.tolist()] if local < len(why) else []
    losses = []
    for start, end in zip(starts, [*starts[1:], len(why)], strict=True):
        number = int(why[start])
        if number != REUSED:
            copy = number - (len(words) - len(found))
            losses.append(Loss(start, end, words[number], found[copy] if copy >= 0 else None))
    return losses
