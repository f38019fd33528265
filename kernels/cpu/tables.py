# SPDX-License-Identifier: Apache-2.0
"""Where the CPU load kernel reads and writes: tables of byte offsets, one layout rule per packing.

Both packings look alike to the kernel: K is a list of *rows* of 16-lane *blocks*. In VEC a row is a
channel and a block 16 tokens of it. In AMX (bf16) a row is two neighbouring channels, interleaved
token by token, so a block is 8 tokens of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvcomm_vllm.kernels.cpu.runs import TILE, Cut, Ints, Tokens, group_bounds, runs, tiles
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation

LINE = 64  # bytes of a cache line

# numpy throughout: a torch operator on tables of this size would wake the whole thread pool.
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tables:
    """What a load's kernels read beside pages, in the order of their destinations.

    Args:
        blocks: ``[blocks, 6]``: destination, first source, second source (bytes from a head's start
            in row 0), lanes from the first source, lanes, may whole blocks be stored past the
            caches.
        block_bounds: ``[groups + 1]``, blocks of each destination page.
        factors: fp32 ``[blocks, row pairs, 2, 16]``, cos and sin as the kernel reads them.
        values: VEC ``[runs, 3]``: source, destination, bytes of V. AMX ``[lines, 5]``: destination,
            and for its even and odd token the source and the bit where that token starts in its
            words.
        value_bounds: ``[groups + 1]``, entries of ``values`` per destination page.
    """

    blocks: Ints
    block_bounds: Ints
    factors: Floats
    values: Ints
    value_bounds: Ints


def build(
    group: PageGroup, tokens: Tokens, turn: Rotation, tiled: tuple[Cut, Ints] | None = None
) -> Tables:
    """Tables of all tokens; needs at least one.

    Args:
        tiled: what ``vec_tiles`` found for these tokens, if it was asked before.
    """
    first = group.layers[0]
    page_bytes, size = first.stride(0) * first.itemsize, first.itemsize
    if group.packing is Packing.AMX:
        return _amx(group, tokens, turn, page_bytes, all_aligned(group))
    cut, blocks = tiled or vec_tiles(group, tokens)
    return Tables(
        blocks,
        cut.bounds,
        vec_factors(tokens, cut, turn),
        *_vec_values(tokens, vec_value_places(group, tokens), group.head_dim * size),
    )


def vec_tiles(group: PageGroup, tokens: Tokens) -> tuple[Cut, Ints]:
    """Tiles of the VEC packing and their rows of ``Tables.blocks``."""
    first = group.layers[0]
    page_bytes, size = first.stride(0) * first.itemsize, first.itemsize
    cut, in_first = tiles(tokens, group.tokens_per_page)
    src = tokens.src_page * page_bytes + tokens.src_at * size
    dst = tokens.dst_page * page_bytes + tokens.dst_at * size
    streams = all_aligned(group) and group.tokens_per_page % TILE == 0
    return cut, _blocks(cut, src, dst, in_first, size, streams)


def vec_value_places(group: PageGroup, tokens: Tokens) -> Ints:
    """Source and destination of each token's V, in bytes from a head's start: ``[tokens, 2]``."""
    first = group.layers[0]
    page_bytes, token_bytes = first.stride(0) * first.itemsize, group.head_dim * first.itemsize
    half = group.tokens_per_page * token_bytes
    src = tokens.src_page * page_bytes + half + tokens.src_at * token_bytes
    dst = tokens.dst_page * page_bytes + half + tokens.dst_at * token_bytes
    return np.stack((src, dst), axis=1)


def head_rows(group: PageGroup) -> dict[str, int]:
    """Fields of a job that say how heads lie in a page, and how K's rows form pairs."""
    first, pairs, step = group.layers[0], group.rotary_dim // 2, group.tokens_per_page
    fields = {"heads": group.kv_heads, "head_bytes": first.stride(1) * first.itemsize}
    if group.packing is Packing.AMX:  # a row is two channels
        row_pairs = pairs if group.interleaved else pairs // 2
        steps = (1, pairs // 2)
        return fields | _pairs(row_pairs, steps, LINE) | {"rows": group.head_dim // 2}
    steps = (2, 1) if group.interleaved else (1, pairs)
    return fields | _pairs(pairs, steps, step * first.itemsize) | {"rows": group.head_dim}


def _pairs(pairs: int, steps: tuple[int, int], row_bytes: int) -> dict[str, int]:
    first, second = steps
    return {"pairs": pairs, "first_step": first, "second_step": second, "row_bytes": row_bytes}


def all_aligned(group: PageGroup) -> bool:
    """True if every head of every page starts on a cache line."""
    first = group.layers[0]
    head_bytes = first.stride(1) * first.itemsize
    return head_bytes % LINE == 0 and all(layer.data_ptr() % LINE == 0 for layer in group.layers)


def _of_tiles(tokens: Tokens, cut: Cut, turn: Rotation) -> tuple[Floats, Floats]:
    """cos and sin of every tile's tokens: fp32 ``[tiles, pairs, 16]``; unused lanes hold any."""
    lanes = np.minimum(cut.first[:, None] + np.arange(TILE), len(tokens.index) - 1)
    index = tokens.index[lanes]
    cos, sin = (np.take(part.numpy(), index, axis=0) for part in (turn.cos, turn.sin))
    return cos.swapaxes(1, 2), sin.swapaxes(1, 2)


def vec_factors(tokens: Tokens, cut: Cut, turn: Rotation) -> Floats:
    """fp32 ``[tiles, pairs, 2, 16]``."""
    cos, sin = _of_tiles(tokens, cut, turn)
    # torch's memory starts on a cache line, numpy's does not, and 16 lanes fill one
    factors = torch.empty((*cos.shape[:2], 2, TILE)).numpy()
    factors[:, :, 0], factors[:, :, 1] = cos, sin
    return factors


def _blocks(
    cut: Cut, src: Ints, dst: Ints, in_first: Ints, token_bytes: int, streams: bool
) -> Ints:
    # The kernel addresses lane i of the second source at i elements behind its entry.
    start = np.minimum(cut.first + in_first, len(src) - 1)
    second = src[start] - in_first * token_bytes
    aligned = streams & (dst[cut.first] % LINE % (TILE * token_bytes) == 0)
    rows = (dst[cut.first], src[cut.first], second, in_first, cut.count, aligned)
    return np.stack(rows, axis=1)


def _vec_values(tokens: Tokens, places: Ints, token_bytes: int) -> tuple[Ints, Ints]:
    cut = runs(tokens)
    starts = places[cut.first]
    return np.stack((starts[:, 0], starts[:, 1], cut.count * token_bytes), axis=1), cut.bounds


def _amx(
    group: PageGroup, tokens: Tokens, turn: Rotation, page_bytes: int, streams: bool
) -> Tables:
    def key(page: Ints, at: Ints) -> Ints:
        return page * page_bytes + (at // TILE) * (group.head_dim // 2) * LINE + (at % TILE) * 4

    cut, in_first = tiles(tokens, TILE)
    src, dst = key(tokens.src_page, tokens.src_at), key(tokens.dst_page, tokens.dst_at)
    tile_rows = _blocks(cut, src, dst, in_first, 4, streams)
    # A tile is two blocks of 8 tokens: 16 lanes each, half a line apart.
    blocks = np.repeat(tile_rows, 2, axis=0)
    blocks[1::2, :3] += LINE // 2
    for column in (3, 4):
        lanes = 2 * tile_rows[:, column]
        blocks[0::2, column], blocks[1::2, column] = lanes.clip(0, TILE), (lanes - TILE).clip(0)
    values, value_bounds = _amx_values(group, tokens, page_bytes)
    factors = _amx_factors(*_of_tiles(tokens, cut, turn), group.interleaved)
    return Tables(blocks, cut.bounds * 2, factors, values, value_bounds)


def _amx_factors(cos: Floats, sin: Floats, interleaved: bool) -> Floats:
    """From ``[tiles, pairs, 16]`` to ``[2 * tiles, row pairs, 2, 16]``: blocks of 8 tokens."""
    if interleaved:  # lanes 2i and 2i + 1 are one pair: x * (c, c) + swapped x * (-s, s)
        parts = [np.stack((cos, cos), axis=-1), np.stack((-sin, sin), axis=-1)]
    else:  # a row holds channels 2c and 2c + 1, whose partners share a row as well
        shape = (len(cos), cos.shape[1] // 2, 2, TILE)
        parts = [part.reshape(shape).swapaxes(2, 3) for part in (cos, sin)]
    blocks = [part.reshape(*part.shape[:2], 2, TILE).swapaxes(1, 2) for part in parts]
    factors = np.ascontiguousarray(np.stack(blocks, axis=3))
    return factors.reshape(2 * len(cos), *factors.shape[2:])


def _amx_values(group: PageGroup, tokens: Tokens, page_bytes: int) -> tuple[Ints, Ints]:
    half = group.tokens_per_page * group.head_dim * 2

    def value(page: Ints, at: Ints) -> Ints:
        return page * page_bytes + half + (at // 2) * LINE

    src, dst = value(tokens.src_page, tokens.src_at), value(tokens.dst_page, tokens.dst_at)
    starts = np.diff(dst, prepend=-1) != 0  # tokens are ordered by destination
    line, lines = np.cumsum(starts) - 1, dst[starts]
    # A token that is not moved keeps its place: its "source" is the destination itself.
    rows = np.stack((lines, lines, np.zeros_like(lines), lines, np.full_like(lines, 16)), axis=1)
    column = 1 + 2 * (tokens.dst_at % 2)
    rows[line, column], rows[line, column + 1] = src, 16 * (tokens.src_at % 2)
    return rows, group_bounds(tokens.dst_page[starts])
