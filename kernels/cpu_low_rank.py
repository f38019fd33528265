# SPDX-License-Identifier: Apache-2.0
"""Compiled kernel of the corrected load with a map of low rank, for the VEC packing.

    K_new = redo * (x_k + dK)        (dK, dV) = mean[index] + (x - x_mean) @ down @ up
    V_new = x_v + dV                 x = (x_k, x_v) = (undo * K, V)

One pass: nothing between the two pages leaves the first-level cache. 16 tokens of one head go
through four products; K comes with tokens in the lanes, V with channels, and so both stay, since
only the few values between ``down`` and ``up`` are transposed. An item is a few layers of a few
pages: few enough layers that their factors, few enough pages that their turns stay in a cache.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from kvcomm_vllm.kernels import cpu_lanes as lane
from kvcomm_vllm.kernels.cpu_kernels import block_access, entry
from kvcomm_vllm.kernels.cpu_products import products, write_pairs
from kvcomm_vllm.kernels.cpu_threads import compile_kernel, job_type, table

JOB = job_type(
    *("bases", "layers", "layer_step", "heads", "head_bytes", "groups", "group_step"),
    *("blocks", "block_count", "block_bounds", "first_token", "token_values", "tokens"),
    *("undo", "redo", "pairs", "first_step", "second_step", "row_bytes", "stream"),
    *("mean_k", "mean_v", "mean_rows", "index", "x_mean", "down", "up", "packed"),
)
LINE = 4 * lane.WIDTH  # bytes of 16 words


def paired(kind: str) -> bool:
    """True if operands are rounded to bf16, which a cache of bf16 does to the result anyway."""
    return kind == "bf16" and lane.HAS_BF16


@cache
def pack_kernel(dim: int, rank: int) -> Any:
    """Rounds the factors of every head to pairs of bf16, ``[heads, 2, 2 * dim * rank / 2]`` words.

    Row k of ``down`` then holds the two channels of pair k of K, later of V: the order in which
    words of x are made. Row k of ``up`` holds its rows 2k and 2k + 1.
    """
    read, bytes_in = lane.MEMORY["fp32"].read, 2 * dim * rank * 4

    @njit
    def pack(a, b, count, out):  # type: ignore[no-untyped-def]
        for c in range(0, 4 * count, LINE):
            write_pairs(out + c, read(a + c), read(b + c))

    @njit
    def body(job, place):  # type: ignore[no-untyped-def]
        factor, row, out = job.down + place * bytes_in, rank * 4, job.packed + place * bytes_in
        for pair in range(dim):
            rotated = pair < job.pairs
            a = pair * job.first_step if rotated else 2 * pair
            b = a + job.second_step if rotated else a + 1
            pack(factor + a * row, factor + b * row, rank, out + pair * row)
        factor, row, out = job.up + place * bytes_in, 2 * dim * 4, out + dim * rank * 4
        for pair in range(rank // 2):
            first = factor + 2 * pair * row
            pack(first, first + row, 2 * dim, out + pair * row)

    return compile_kernel(body, JOB)


@cache
def _readers(kind: str, dim: int) -> tuple[Any, ...]:
    """``keys`` and ``values`` of a tile: words of ``x - x_mean``, and fp32 ``x + mean``."""
    two, memory, words = paired(kind), lane.MEMORY[kind], lane.MEMORY["fp32"]
    read, join, size, factor, store = memory.read, memory.join, memory.size, words.read, words.write
    narrow, word_bytes = lane.MEMORY["bf16" if two else "fp32"].write, 2 if two else 4
    add, fused, multiply, negate = lane.add, lane.fused, lane.multiply, lane.negate
    spread, prefetch, transpose = lane.spread, lane.prefetch, lane.transpose

    @njit
    def mean_row(job, layer, head, row):  # type: ignore[no-untyped-def]
        return ((layer * job.mean_rows + row) * job.heads + head) * dim * 4

    @njit
    def means(job, layer, head, first, end, rows, columns):  # type: ignore[no-untyped-def]
        """Mean dK of a tile: the last row, or 0 if tokens differ; ``columns`` then hold theirs."""
        index, later = table(job.index, job.tokens, 1), True
        for token in range(first, end):
            later = later and index[token, 0] == job.mean_rows - 1
        if later:
            return job.mean_k + mean_row(job, layer, head, job.mean_rows - 1)
        for token in range(first, end):
            row = job.mean_k + mean_row(job, layer, head, index[token, 0])
            for c in range(0, dim * 4, LINE):
                store(rows + (token - first) * dim * 4 + c, factor(row + c))
        for c in range(0, dim, 16):
            transpose(rows + c * 4, dim * 4, columns + c * LINE, LINE)
        return 0

    @njit
    def put_words(words, pair, a, b, x, y):  # type: ignore[no-untyped-def]
        if two:
            write_pairs(words + pair * LINE, x, y)
        else:
            store(words + a * LINE, x)
            store(words + b * LINE, y)

    def key_loop(fetch: Any, mean_of: Any) -> Any:
        @njit
        def loop(job, base, t, near, far, mean, centre, words, out):  # type: ignore[no-untyped-def]
            block = entry(table(job.blocks, job.block_count, 6), t)
            row, turn = job.row_bytes, job.undo + t * job.pairs * 2 * LINE
            for pair in range(dim // 2):
                rotated = pair < job.pairs
                a = pair * job.first_step if rotated else 2 * pair
                b = a + job.second_step if rotated else a + 1
                p, q = base + a * row, base + b * row
                x, y = fetch(p, block), fetch(q, block)
                if near:
                    prefetch(p + near)
                    prefetch(q + near)
                if far:
                    prefetch(p + far)
                    prefetch(q + far)
                if rotated:
                    c, s = factor(turn), factor(turn + LINE)
                    x, y = fused(x, c, negate(multiply(y, s))), fused(y, c, multiply(x, s))
                    turn += 2 * LINE
                less_x, less_y = negate(spread(centre + a * 4)), negate(spread(centre + b * 4))
                put_words(words, pair, a, b, add(x, less_x), add(y, less_y))
                store(out + a * LINE, add(x, mean_of(mean, a)))
                store(out + b * LINE, add(y, mean_of(mean, b)))

        return loop

    @njit
    def whole(row, block):  # type: ignore[no-untyped-def]
        return read(row + block[1])

    @njit
    def parts(row, block):  # type: ignore[no-untyped-def]
        return join(row + block[1], row + block[2], block[3], block[4])

    @njit
    def one_mean(mean, channel):  # type: ignore[no-untyped-def]
        return spread(mean + channel * 4)

    @njit
    def own_means(columns, channel):  # type: ignore[no-untyped-def]
        return factor(columns + channel * LINE)

    whole_one, whole_own = key_loop(whole, one_mean), key_loop(whole, own_means)
    parts_one, parts_own = key_loop(parts, one_mean), key_loop(parts, own_means)

    @njit
    def keys(job, base, t, ahead, first, last, mean, columns, centre, words, out):  # type: ignore[no-untyped-def]
        block = entry(table(job.blocks, job.block_count, 6), t)
        near = block[1] + ahead if first else 0
        far = 0
        if last:
            far = block[1 if block[3] == block[4] else 2] + (block[4] - 1) * size + ahead
        if block[3] == 16 and mean:
            whole_one(job, base, t, near, far, mean, centre, words, out)
        elif block[3] == 16:
            whole_own(job, base, t, near, far, columns, centre, words, out)
        elif mean:
            parts_one(job, base, t, near, far, mean, centre, words, out)
        else:
            parts_own(job, base, t, near, far, columns, centre, words, out)

    @njit
    def values(job, base, layer, head, first, end, ahead, centre, words, out):  # type: ignore[no-untyped-def]
        places, index = table(job.token_values, job.tokens, 2), table(job.index, job.tokens, 1)
        for token in range(first, end):
            source = base + places[token, 0]
            mean = job.mean_v + mean_row(job, layer, head, index[token, 0])
            for c in range(0, dim, 16):
                if c * size % 64 == 0:
                    prefetch(source + c * size + ahead)
                x = read(source + c * size)
                narrow(words + c * word_bytes, add(x, negate(factor(centre + c * 4))))
                store(out + c * 4, add(x, factor(mean + c * 4)))
            words += dim * word_bytes
            out += dim * 4

    return means, keys, values


@cache
def _mapper(kind: str, dim: int, rank: int) -> Any:
    """Adds ``words @ down @ up`` to K ``[dim, 16]`` and V ``[16, dim]`` of a tile."""
    two, words_of = paired(kind), lane.MEMORY["fp32"]
    read, store, narrow = words_of.read, words_of.write, lane.MEMORY["bf16"].write
    zero, transpose = lane.zero, lane.transpose
    per_word = 2 if two else 1
    inputs, inner, row, width = dim // per_word, rank // per_word, rank * 4, 2 * dim * 4
    inner_row = -(-inner // 16) * LINE if two else row
    by_channel, of_inner = products(two, LINE, 4), products(two, dim * 4, inner_row)
    of_values = products(two, row, inputs * 4)

    @njit
    def apply(key_words, value_words, down, up, space, keys, values):  # type: ignore[no-untyped-def]
        columns, rows = space, space + rank * LINE
        narrowed = rows + rank * LINE if two else rows
        turned = rows + 2 * rank * LINE
        for r in range(rank):
            store(columns + r * LINE, zero())
        for r in range(0, rank, 16):
            by_channel(columns + r * LINE, key_words, LINE, down + r * 4, row, inputs)
            transpose(columns + r * LINE, LINE, rows + r * 4, row)
            of_values(rows + r * 4, down + inputs * row + r * 4, row, value_words, 4, inputs)
        if two:
            for i in range(16):
                for r in range(0, rank, 16):
                    narrow(narrowed + i * inner_row + r * 2, read(rows + i * row + r * 4))
        for w in range(0, inner, 16):
            transpose(narrowed + w * 4, inner_row, turned + w * LINE, LINE)
        for c in range(0, dim, 16):
            of_inner(values + c * 4, up + (dim + c) * 4, width, narrowed, 4, inner)
            by_channel(keys + c * LINE, turned, LINE, up + c * 4, width, inner)

    return apply


@cache
def _writers(kind: str, dim: int) -> tuple[Any, Any]:
    """``keys`` of two tiles of a page together, so that cache lines fill; ``values`` of one."""
    _, put = block_access(kind)
    memory, factor = lane.MEMORY[kind], lane.MEMORY["fp32"].read
    write, stream, size = memory.write, memory.stream, memory.size
    fused, multiply, negate = lane.fused, lane.multiply, lane.negate

    @njit
    def turn(base, a, b, block, redo, x, y):  # type: ignore[no-untyped-def]
        c, s = factor(redo), factor(redo + LINE)
        put(base + a, fused(x, c, negate(multiply(y, s))), block)
        put(base + b, fused(y, c, multiply(x, s)), block)

    @njit
    def keys(job, base, t, u, keys_t, keys_u):  # type: ignore[no-untyped-def]
        blocks, row, tile = table(job.blocks, job.block_count, 6), job.row_bytes, job.pairs * 2
        p, q = entry(blocks, t), entry(blocks, u)
        redo_t, redo_u = job.redo + t * tile * LINE, job.redo + u * tile * LINE
        for pair in range(job.pairs):
            a = pair * job.first_step
            b, f = a + job.second_step, pair * 2 * LINE
            x, y = factor(keys_t + a * LINE), factor(keys_t + b * LINE)
            turn(base, a * row, b * row, p, redo_t + f, x, y)
            if t < u:
                x, y = factor(keys_u + a * LINE), factor(keys_u + b * LINE)
                turn(base, a * row, b * row, q, redo_u + f, x, y)
        for a in range(2 * job.pairs, dim):
            put(base + a * row, factor(keys_t + a * LINE), p)
            if t < u:
                put(base + a * row, factor(keys_u + a * LINE), q)

    @njit
    def values(job, base, first, end, rows):  # type: ignore[no-untyped-def]
        places, past_caches = table(job.token_values, job.tokens, 2), job.stream
        for token in range(first, end):
            target = base + places[token, 1]
            for c in range(0, dim, 16):
                x = factor(rows + c * 4)
                if past_caches:
                    stream(target + c * size, x)
                else:
                    write(target + c * size, x)
            rows += dim * 4

    return keys, values


@cache
def low_rank_kernel(kind: str, dim: int, rank: int) -> Any:
    """Compiled for one head size and rank (a multiple of 16): strides are then constants."""
    means, read_keys, read_values = _readers(kind, dim)
    apply, (write_keys, write_values) = _mapper(kind, dim, rank), _writers(kind, dim)
    two, tile, factors = paired(kind), dim * LINE, 2 * dim * rank * 4
    space = 7 * tile + 4 * rank * LINE + LINE
    wide = lane.MEMORY[kind].size == 4  # a tile's row is a cache line, else half of one

    @njit
    def one_head(job, layer, head, lo, hi, ahead, keys):  # type: ignore[no-untyped-def]
        bases, firsts = (
            table(job.bases, job.layers, 1),
            table(job.first_token, job.block_count + 1, 1),
        )
        base, place = bases[layer, 0] + head * job.head_bytes, layer * job.heads + head
        others, values, columns = keys + tile, keys + 2 * tile, keys + 3 * tile
        key_words, value_words, rows = keys + 4 * tile, keys + 5 * tile, keys + 6 * tile
        between, centre = keys + 7 * tile, job.x_mean + place * 2 * dim * 4
        down, up = job.down + place * factors, job.up + place * factors
        if two:
            down = job.packed + place * factors
            up = down + factors // 2
        for t in range(lo, hi):
            first, end, odd = firsts[t, 0], firsts[t + 1, 0], (t - lo) % 2
            out = others if odd else keys
            mean = means(job, layer, head, first, end, rows, columns)
            last = wide or odd or t + 1 == hi
            read_keys(job, base, t, ahead, t == lo, last, mean, columns, centre, key_words, out)
            centre_v = centre + dim * 4
            read_values(job, base, layer, head, first, end, ahead, centre_v, value_words, values)
            apply(key_words, value_words, down, up, between, out, values)
            write_values(job, base, first, end, values)
            if odd or t + 1 == hi:
                write_keys(job, base, t - odd, t, keys, others)

    @njit
    def body(job, item):  # type: ignore[no-untyped-def]
        bases, bounds = table(job.bases, job.layers, 1), table(job.block_bounds, job.groups + 1, 1)
        blocks = table(job.blocks, job.block_count, 6)
        parts = (job.groups + job.group_step - 1) // job.group_step
        begin, start = item // parts * job.layer_step, item % parts * job.group_step
        end = min(job.layers, begin + job.layer_step)
        memory = np.empty(space, np.uint8)
        keys = (memory.ctypes.data + LINE - 1) // LINE * LINE  # no access crosses a cache line
        for group in range(start, min(job.groups, start + job.group_step)):
            lo, hi = bounds[group, 0], bounds[group + 1, 0]
            for layer in range(begin, end):
                for head in range(job.heads):
                    ahead = job.head_bytes
                    if head + 1 == job.heads:
                        ahead *= -head
                        if layer + 1 < end:
                            ahead += bases[layer + 1, 0] - bases[layer, 0]
                        elif group + 1 < job.groups:
                            ahead += (
                                bases[begin, 0] - bases[layer, 0] + blocks[hi, 1] - blocks[lo, 1]
                            )
                    one_head(job, layer, head, lo, hi, ahead, keys)

    return compile_kernel(body, JOB)
