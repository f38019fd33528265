# SPDX-License-Identifier: Apache-2.0
"""Which pages a request could read if they were there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvcomm_vllm.compat.events import ExactPage, exact_page
from kvcomm_vllm.scheduler.index import Match, Sequence
from kvcomm_vllm.scheduler.pages import SourcePages


@dataclass(frozen=True)
class Text:
    """Whose pages they are.

    Args:
        names: of its pages, in order; ``tokens``: in them.
        exact: how many of its first tokens are exact, and their names vLLM's own.
        salt: of the request that it is of, or is to be read by: they have the same.
    """

    names: Listing[bytes]
    tokens: np.ndarray
    exact: int
    salt: str | None

    def page(self, name: bytes, size: int) -> ExactPage | None:
        """What everybody may hear of a page; None if it is not exact, or of another text."""
        number = self._numbers.get(name)
        if number is None or (number + 1) * size > min(self.exact, len(self.tokens)):
            return None
        first, last = number * size, (number + 1) * size
        return exact_page(self.names, number, self.tokens[first:last].tolist(), self.salt)

    @cached_property
    def _numbers(self) -> dict[bytes, int]:
        return {name: number for number, name in enumerate(self.names)}


def text_of(sequence: Sequence, salt: str | None) -> Text:
    return Text(sequence.block_hashes, sequence.tokens, sequence.exact_tokens, salt)


@dataclass(frozen=True)
class Wanted:
    """Pages by name, and how many tokens of each are filled.

    Args:
        chained: each is of use only with all before it.
        sequences: whose pages they are, where others have the same text.
    """

    pages: dict[bytes, int]
    texts: Listing[Text]
    chained: bool = False
    sequences: Listing[Sequence] = ()

    def exact(self, name: bytes, size: int) -> ExactPage | None:
        """What everybody may hear of a page; None if it is not exact."""
        found = (text.page(name, size) for text in self.texts)
        return next((page for page in found if page is not None), None)


def chain(text: Text, first: int, block_size: int) -> Wanted:
    """Full pages from the ``first`` on, of a prompt or of what goes on from there."""
    return Wanted(dict.fromkeys(text.names[first:], block_size), [text], chained=True)


def missing(
    matches: Iterable[Match], pages: SourcePages, prompt: np.ndarray, salt: str | None
) -> Wanted:
    """The matches' pages whose text no page in the KV cache has."""
    ready = [match for match in matches if match.sequence.ready]
    ready.sort(key=lambda match: not match.sequence.intact)
    there = np.zeros(len(prompt), np.bool_)
    for match in ready:
        for source in pages.sources(match, prompt):
            there[source.prompt_start : source.end] = True
    found: dict[bytes, int] = {}
    for match in ready:
        for name, tokens, start, end in _pages_of(match, pages.block_size):
            if not there[start:end].all():
                there[start:end] = True
                found[name] = tokens
    texts = [text_of(match.sequence, salt) for match in ready]
    return Wanted(found, texts, sequences=[match.sequence for match in ready])


def _pages_of(match: Match, size: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, filled tokens, and the part of the prompt that each page of a match has."""
    sequence: Sequence = match.sequence
    shift = match.prompt_start - match.sequence_start
    stop = match.sequence_start + match.length
    for number in range(match.sequence_start // size, -(-stop // size)):
        first, last = number * size, min((number + 1) * size, len(sequence.tokens))
        start, end = max(first, match.sequence_start), min(last, stop)
        yield sequence.block_hashes[number], last - first, start + shift, end + shift
