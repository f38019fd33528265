# SPDX-License-Identifier: Apache-2.0
"""Which pages a request could read if they were there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np

from kvcomm_vllm.scheduler.index import Match, Sequence
from kvcomm_vllm.scheduler.pages import SourcePages


@dataclass(frozen=True)
class Wanted:
    """Pages by name, and how many tokens of each are filled.

    Args:
        chained: each is of use only with all before it.
    """

    pages: dict[bytes, int]
    chained: bool = False


def chain(names: Listing[bytes], block_size: int) -> Wanted:
    """Full pages, the first ones of a prompt or of what goes on from there."""
    return Wanted(dict.fromkeys(names, block_size), chained=True)


def missing(matches: Iterable[Match], pages: SourcePages, prompt: np.ndarray) -> Wanted:
    """The matches' pages whose text no page in the KV cache has."""
    ready = [match for match in matches if match.sequence.ready]
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
    return Wanted(found)


def _pages_of(match: Match, size: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, filled tokens, and the part of the prompt that each page of a match has."""
    sequence: Sequence = match.sequence
    shift = match.prompt_start - match.sequence_start
    stop = match.sequence_start + match.length
    for number in range(match.sequence_start // size, -(-stop // size)):
        first, last = number * size, min((number + 1) * size, len(sequence.tokens))
        start, end = max(first, match.sequence_start), min(last, stop)
        yield sequence.block_hashes[number], last - first, start + shift, end + shift
