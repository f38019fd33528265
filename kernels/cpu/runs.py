# SPDX-License-Identifier: Apache-2.0
"""Slots cut into the pieces that CPU kernels move: runs, and tiles of at most 16 tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]

TILE = 16


@dataclass(frozen=True)
class Tokens:
    """The tokens to move, ordered by destination: their slots' pages and offsets, their index."""

    src_page: Ints
    src_at: Ints
    dst_page: Ints
    dst_at: Ints
    index: Ints


@dataclass(frozen=True)
class Cut:
    """Pieces of tokens that follow each other in their destination page.

    Args:
        first, count: per piece the position in ``Tokens`` of its first token, and how many follow.
        bounds: ``[groups + 1]``: the pieces of one destination page form a group; one thread writes
            all of it, so threads share no cache line.
    """

    first: Ints
    count: Ints
    bounds: Ints


def split(src_slots: torch.Tensor, dst_slots: torch.Tensor, tokens_per_page: int) -> Tokens:
    """Int64 ``[tokens]`` slots, those with a negative one left out."""
    src, dst = src_slots.numpy(), dst_slots.numpy()
    index = np.flatnonzero((src >= 0) & (dst >= 0))
    index = index[np.argsort(dst[index], kind="stable")]
    src, dst = src[index], dst[index]
    return Tokens(*np.divmod(src, tokens_per_page), *np.divmod(dst, tokens_per_page), index)


def _starts(page: Ints, at: Ints) -> npt.NDArray[np.bool_]:
    """True where a token does not directly follow the one before it in the same page."""
    starts = np.ones(len(page), dtype=bool)
    starts[1:] = (np.diff(page) != 0) | (np.diff(at) != 1)
    return starts


def group_bounds(page: Ints) -> Ints:
    """Where the destination page changes, with both ends; needs at least one entry."""
    return np.concatenate(([0], np.flatnonzero(np.diff(page)) + 1, [len(page)])).astype(np.int64)


def _cut(tokens: Tokens, starts: npt.NDArray[np.bool_]) -> Cut:
    first = np.flatnonzero(starts)
    return Cut(first, np.diff(first, append=len(starts)), group_bounds(tokens.dst_page[first]))


def _dst_starts(tokens: Tokens) -> npt.NDArray[np.bool_]:
    starts = _starts(tokens.dst_page, tokens.dst_at)
    starts[1:] |= np.diff(tokens.index) != 1
    return starts


def runs(tokens: Tokens) -> Cut:
    """Pieces that lie contiguously in one source and one destination page."""
    return _cut(tokens, _dst_starts(tokens) | _starts(tokens.src_page, tokens.src_at))


def tiles(tokens: Tokens, granule: int) -> tuple[Cut, Ints]:
    """Pieces inside 16 aligned tokens of a destination page, from at most two stretches of source.

    A whole tile is written by one aligned vector store wherever its two parts come from; that is
    what lets a span move to any other alignment without half-written cache lines.

    Args:
        granule: tokens that lie contiguously in a page: all of the page, or 16 in the AMX packing.

    Returns:
        The pieces, and per piece how many of its tokens lie in the first stretch.
    """
    jumps = _starts(tokens.src_page, tokens.src_at) | (tokens.src_at % granule == 0)
    starts = _dst_starts(tokens) | (tokens.dst_at % TILE == 0)
    position = np.arange(len(starts))
    while True:
        owner = np.cumsum(starts) - 1
        inner = np.flatnonzero(jumps & ~starts)
        later = inner[1:][np.diff(owner[inner]) == 0]  # the second jump inside one piece
        if len(later) == 0:
            break
        _, once = np.unique(owner[later], return_index=True)
        starts[later[once]] = True
    cut = _cut(tokens, starts)
    in_first = cut.count.copy()
    if len(inner):
        in_first[owner[inner]] = position[inner] - cut.first[owner[inner]]
    return cut, in_first
