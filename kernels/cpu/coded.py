# SPDX-License-Identifier: Apache-2.0
"""Compiled kernel of the corrected load with codes, for the VEC packing.

    K_new = redo * (undo * K + dK)        (dK, dV) = mean[row] + code @ up
    V_new = V + dV

One pass: nothing between the two pages leaves the first-level cache. K of 16 tokens of a head comes
with tokens in the lanes, V with channels, and so both stay: of the tokens' codes, which all heads
of a layer share, there is one copy for each. An item is a few layers of a few pages: few enough
layers that their factors, few enough pages that their turns stay in a cache.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from kvcomm_vllm.kernels.cpu import lanes as lane
from kvcomm_vllm.kernels.cpu.load_kernels import block_access, entry, rotation
from kvcomm_vllm.kernels.cpu.products import products, write_pairs
from kvcomm_vllm.kernels.cpu.threads import compile_kernel, job_type, table

JOB = job_type(
    *("bases", "layers", "layer_step", "heads", "head_bytes", "groups", "group_step"),
    *("blocks", "block_count", "block_bounds", "first_token", "token_values", "tokens"),
    *("undo", "redo", "pairs", "first_step", "second_step", "row_bytes", "stream"),
    *("mean_k", "mean_v", "mean_layers", "rows", "code", "code_rows", "up", "packed", "most_tiles"),
)
LINE = 4 * lane.WIDTH  # bytes of 16 words


def paired(kind: str) -> bool:
    """True if operands are rounded to bf16, which a cache of bf16 does to the result anyway."""
    return kind == "bf16" and lane.HAS_BF16


@cache
def pack_kernel(dim: int, rank: int) -> Any:
    """Rounds ``up`` of every head to pairs of bf16, ``[heads, rank / 2, 2 * dim]`` words: row k
    holds its rows 2k and 2k + 1.
    """
    read, row = lane.MEMORY["fp32"].read, 2 * dim * 4

    @njit
    def body(job, place):  # type: ignore[no-untyped-def]
        up, out = job.up + place * rank * row, job.packed + place * rank // 2 * row
        for pair in range(rank // 2):
            first, words = up + 2 * pair * row, out + pair * row
            for c in range(0, row, LINE):
                write_pairs(words + c, read(first + c), read(first + row + c))

    return compile_kernel(body, JOB, "pack", dim, rank)


def _code_row(kind: str, rank: int) -> int:
    """Bytes of a token's code in words, whole cache lines."""
    return -(-rank // (32 if paired(kind) else 16)) * LINE


@cache
def _code_reader(kind: str, code_kind: str, rank: int) -> Any:
    """Words of the codes of a tile: ``[16, row]`` and, behind it, the same transposed."""
    memory, row = lane.MEMORY[code_kind], _code_row(kind, rank)
    read, size, prefetch, transpose = memory.read, memory.size, lane.prefetch, lane.transpose
    words_of = lane.MEMORY["bf16" if paired(kind) else "fp32"]
    narrow, word_bytes = words_of.write, words_of.size

    @njit
    def codes(job, layer, first, end, words):  # type: ignore[no-untyped-def]
        rows = table(job.code_rows, job.tokens, 1)
        for i in range(16):
            token = min(first + i, end - 1)  # a tile of fewer repeats its last one
            source = job.code + (rows[token, 0] * job.layers + layer) * rank * size
            for r in range(0, rank, 16):
                narrow(words + i * row + r * word_bytes, read(source + r * size))
                prefetch(source + (rank + r) * size)  # the next layer
        for w in range(0, row, LINE):
            transpose(words + w, row, words + 16 * row + w * 16, LINE)

    return codes


@cache
def _readers(kind: str, dim: int) -> tuple[Any, ...]:
    """``means``, ``keys`` and ``values`` of a tile: the last two fp32, with their mean added."""
    memory, words = lane.MEMORY[kind], lane.MEMORY["fp32"]
    read, join, size, factor, store = memory.read, memory.join, memory.size, words.read, words.write
    spread, prefetch, transpose = lane.spread, lane.prefetch, lane.transpose
    add, rotate = lane.add, rotation()

    @njit
    def mean_row(job, layer, head, row):  # type: ignore[no-untyped-def]
        return ((row * job.mean_layers + layer) * job.heads + head) * dim * 4

    @njit
    def means(job, layer, head, first, end, rows, columns):  # type: ignore[no-untyped-def]
        """Mean dK of a tile: of all its tokens, or 0 if they differ; ``columns`` then hold it."""
        row_of, equal = table(job.rows, job.tokens, 1), True
        for token in range(first, end):
            equal = equal and row_of[token, 0] == row_of[first, 0]
        if equal:
            return job.mean_k + mean_row(job, layer, head, row_of[first, 0])
        for token in range(first, end):
            row = job.mean_k + mean_row(job, layer, head, row_of[token, 0])
            for c in range(0, dim * 4, LINE):
                store(rows + (token - first) * dim * 4 + c, factor(row + c))
        for c in range(0, dim, 16):
            transpose(rows + c * 4, dim * 4, columns + c * LINE, LINE)
        return 0

    def key_loop(fetch: Any, mean_of: Any) -> Any:
        @njit
        def loop(job, base, t, near, far, mean, out):  # type: ignore[no-untyped-def]
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
                    x, y = rotate(x, y, turn)
                    turn += 2 * LINE
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
    def keys(job, base, t, ahead, first, last, mean, columns, out):  # type: ignore[no-untyped-def]
        block = entry(table(job.blocks, job.block_count, 6), t)
        near = block[1] + ahead if first else 0
        far = 0
        if last:
            far = block[1 if block[3] == block[4] else 2] + (block[4] - 1) * size + ahead
        if block[3] == 16 and mean:
            whole_one(job, base, t, near, far, mean, out)
        elif block[3] == 16:
            whole_own(job, base, t, near, far, columns, out)
        elif mean:
            parts_one(job, base, t, near, far, mean, out)
        else:
            parts_own(job, base, t, near, far, columns, out)

    @njit
    def values(job, base, layer, head, first, end, ahead, out):  # type: ignore[no-untyped-def]
        places, row_of = table(job.token_values, job.tokens, 2), table(job.rows, job.tokens, 1)
        for token in range(first, end):
            source = base + places[token, 0]
            mean = job.mean_v + mean_row(job, layer, head, row_of[token, 0])
            for c in range(0, dim, 16):
                if c * size % 64 == 0:
                    prefetch(source + c * size + ahead)
                store(out + c * 4, add(read(source + c * size), factor(mean + c * 4)))
            out += dim * 4

    return means, keys, values


@cache
def _adder(kind: str, dim: int, rank: int) -> Any:
    """Adds ``code @ up`` to K ``[dim, 16]`` and V ``[16, dim]`` of a tile."""
    two, row, width = paired(kind), _code_row(kind, rank), 2 * dim * 4
    inner = rank // 2 if two else rank
    by_channel, by_token = products(two, LINE, 4), products(two, dim * 4, row)

    @njit
    def apply(words, up, keys, values):  # type: ignore[no-untyped-def]
        turned = words + 16 * row
        for c in range(0, dim, 16):
            by_token(values + c * 4, up + (dim + c) * 4, width, words, 4, inner)
            by_channel(keys + c * LINE, turned, LINE, up + c * 4, width, inner)

    return apply


@cache
def _writers(kind: str, dim: int) -> tuple[Any, Any]:
    """``keys`` of two tiles of a page together, so that cache lines fill; ``values`` of one."""
    _, put = block_access(kind)
    memory, factor = lane.MEMORY[kind], lane.MEMORY["fp32"].read
    write, stream, size = memory.write, memory.stream, memory.size
    rotate = rotation()

    @njit
    def turn(base, a, b, block, redo, x, y):  # type: ignore[no-untyped-def]
        x, y = rotate(x, y, redo)
        put(base + a, x, block)
        put(base + b, y, block)

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
def coded_kernel(kind: str, code_kind: str, dim: int, rank: int) -> Any:
    """Compiled for one head size and rank (a multiple of 16): strides are then constants."""
    means, read_keys, read_values = _readers(kind, dim)
    read_codes, apply = _code_reader(kind, code_kind, rank), _adder(kind, dim, rank)
    write_keys, write_values = _writers(kind, dim)
    two, tile, code_tile = paired(kind), dim * LINE, 32 * _code_row(kind, rank)
    factors = dim * rank * (4 if two else 8)
    wide = lane.MEMORY[kind].size == 4  # a tile's row is a cache line, else half of one

    @njit
    def one_head(job, layer, head, lo, hi, ahead, keys, words):  # type: ignore[no-untyped-def]
        bases, firsts = (
            table(job.bases, job.layers, 1),
            table(job.first_token, job.block_count + 1, 1),
        )
        base, place = bases[layer, 0] + head * job.head_bytes, layer * job.heads + head
        others, values = keys + tile, keys + 2 * tile
        rows, columns = keys + 3 * tile, keys + 4 * tile
        up = (job.packed if two else job.up) + place * factors
        for t in range(lo, hi):
            first, end, odd = firsts[t, 0], firsts[t + 1, 0], (t - lo) % 2
            out = others if odd else keys
            mean = means(job, layer, head, first, end, rows, columns)
            last = wide or odd or t + 1 == hi
            read_keys(job, base, t, ahead, t == lo, last, mean, columns, out)
            read_values(job, base, layer, head, first, end, ahead, values)
            apply(words + (t - lo) * code_tile, up, out, values)
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
        firsts = table(job.first_token, job.block_count + 1, 1)
        memory = np.empty(5 * tile + job.most_tiles * code_tile + LINE, np.uint8)
        keys = (memory.ctypes.data + LINE - 1) // LINE * LINE  # no access crosses a cache line
        words = keys + 5 * tile
        for group in range(start, min(job.groups, start + job.group_step)):
            lo, hi = bounds[group, 0], bounds[group + 1, 0]
            for layer in range(begin, end):
                for t in range(lo, hi):
                    code = words + (t - lo) * code_tile
                    read_codes(job, layer, firsts[t, 0], firsts[t + 1, 0], code)
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
                    one_head(job, layer, head, lo, hi, ahead, keys, words)

    return compile_kernel(body, JOB, "coded", kind, code_kind, dim, rank, paired(kind))
