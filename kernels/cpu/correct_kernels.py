# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels of the corrected load, for the VEC packing with whole lanes of channels.

    K_new = redo * (undo * K + dK)        V_new = V + dV

Deviations are token-major, K in the page is channel-major: a tile of 16 tokens meets the other
order in a scratch that stays in the first-level cache.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from kvcomm_vllm.kernels.cpu import lanes as lane
from kvcomm_vllm.kernels.cpu.load_kernels import block_access, entry, rotation
from kvcomm_vllm.kernels.cpu.threads import compile_kernel, job_type, table

JOB = job_type(
    *("bases", "layers", "layer_step", "heads", "head_bytes", "groups"),
    *("blocks", "block_count", "block_bounds", "first_token", "token_values", "tokens"),
    *("undo", "redo", "head_dim", "pairs", "first_step", "second_step", "row_bytes", "stream"),
    *("mean_k", "mean_v", "mean_layers", "rows"),
    *(
        "dk",
        "dv",
        "row_stride",
        "layer_stride",
        "head_stride",
        "anchor_rows",
        "wk",
        "wv",
        "anchors",
    ),
)


@cache
def _finish(kind: str) -> Any:
    """Turns K of tiles t and u back, adds their deviations, turns it to its place and writes it."""
    fetch, put = block_access(kind)
    factor, line = lane.MEMORY["fp32"].read, 4 * lane.WIDTH
    add, rotate = lane.add, rotation()

    @njit
    def turn(base, a, b, block, undo, redo, da, db, ahead):  # type: ignore[no-untyped-def]
        x, y = fetch(base, a, block, ahead), fetch(base, b, block, ahead)
        x, y = rotate(x, y, undo)
        x, y = rotate(add(x, factor(da)), add(y, factor(db)), redo)
        put(base + a, x, block)
        put(base + b, y, block)

    @njit
    def shift(base, a, block, deviation, ahead):  # type: ignore[no-untyped-def]
        put(base + a, add(fetch(base, a, block, ahead), factor(deviation)), block)

    @njit
    def finish(job, base, t, u, ahead, dev_t, dev_u):  # type: ignore[no-untyped-def]
        """Tiles t and u of a page together, so that cache lines are written whole."""
        blocks = table(job.blocks, job.block_count, 6)
        p, q, tile = entry(blocks, t), entry(blocks, u), job.pairs * 2 * line
        undo_t, redo_t = job.undo + t * tile, job.redo + t * tile
        undo_u, redo_u = job.undo + u * tile, job.redo + u * tile
        pairs, row, dim = job.pairs, job.row_bytes, job.head_dim
        first_step, second_step = job.first_step, job.second_step
        for pair in range(pairs):
            i, f = pair * first_step, pair * 2 * line
            j = i + second_step
            a, b, da, db = i * row, j * row, i * line, j * line
            turn(base, a, b, p, undo_t + f, redo_t + f, dev_t + da, dev_t + db, ahead)
            if t < u:
                turn(base, a, b, q, undo_u + f, redo_u + f, dev_u + da, dev_u + db, ahead)
        for i in range(2 * pairs, dim):
            shift(base, i * row, p, dev_t + i * line, ahead)
            if t < u:
                shift(base, i * row, q, dev_u + i * line, ahead)

    return finish


@njit
def _layers(job, item):  # type: ignore[no-untyped-def]
    """(group, first layer, end) of an item."""
    parts = (job.layers + job.layer_step - 1) // job.layer_step
    part = item % parts
    return item // parts, part * job.layer_step, min(job.layers, (part + 1) * job.layer_step)


@njit
def _ahead(job, layer, end, head):  # type: ignore[no-untyped-def]
    """Distance to the same place of the head that comes next."""
    if head + 1 < job.heads or layer + 1 == end:
        return job.head_bytes
    bases = table(job.bases, job.layers, 1)
    return bases[layer + 1, 0] - bases[layer, 0] - head * job.head_bytes


@cache
def _mean_fill() -> Any:
    words = lane.MEMORY["fp32"]
    factor, store = words.read, words.write

    @njit
    def fill(job, layer, head, token, out):  # type: ignore[no-untyped-def]
        dim, rows = job.head_dim, table(job.rows, job.tokens, 1)
        row = (rows[token, 0] * job.mean_layers + layer) * job.heads + head
        for c in range(0, dim, 16):
            store(out + c * 4, factor(job.mean_k + (row * dim + c) * 4))
            store(out + (dim + c) * 4, factor(job.mean_v + (row * dim + c) * 4))

    return fill


@cache
def _anchor_fill(arena_kind: str) -> Any:
    words, arena = lane.MEMORY["fp32"], lane.MEMORY[arena_kind]
    factor, store, widen, size = words.read, words.write, arena.read, arena.size
    fused, spread, zero, prefetch = lane.fused, lane.spread, lane.zero, lane.prefetch

    @njit
    def fill(job, layer, head, token, out):  # type: ignore[no-untyped-def]
        dim, rows = job.head_dim, table(job.anchor_rows, job.anchors, job.tokens)
        for c in range(0, 2 * dim, 16):
            store(out + c * 4, zero())
        for anchor in range(job.anchors):
            row = rows[anchor, token]
            if row < 0:
                continue
            at = row * job.row_stride + layer * job.layer_stride + head * job.head_stride
            weight = (anchor * job.tokens + token) * 4
            wk, wv = spread(job.wk + weight), spread(job.wv + weight)
            for c in range(0, dim, 16):
                k, v = out + c * 4, out + (dim + c) * 4
                prefetch(job.dk + at + job.head_stride + c * size)
                prefetch(job.dv + at + job.head_stride + c * size)
                store(k, fused(wk, widen(job.dk + at + c * size), factor(k)))
                store(v, fused(wv, widen(job.dv + at + c * size), factor(v)))

    return fill


@cache
def finish_kernel(kind: str, arena_kind: str | None) -> Any:
    """Writes the corrected pages: with a sum of anchors, or where there is no arena with a mean."""
    fill = _anchor_fill(arena_kind) if arena_kind else _mean_fill()
    finish = _finish(kind)
    memory, factor, line = lane.MEMORY[kind], lane.MEMORY["fp32"].read, 4 * lane.WIDTH
    read, write, size = memory.read, memory.write, memory.size
    add, transpose, layers_of = lane.add, lane.transpose, _layers
    ahead_of, prefetch, stream = _ahead, lane.prefetch, memory.stream

    @njit
    def deviate(job, base, layer, head, t, ahead, rows, keys):  # type: ignore[no-untyped-def]
        """V of a tile's tokens is written here; dK is left in ``keys`` ``[head_dim, 16]``."""
        firsts = table(job.first_token, job.block_count + 1, 1)
        values, dim = table(job.token_values, job.tokens, 2), job.head_dim
        past_caches = job.stream
        for token in range(firsts[t, 0], firsts[t + 1, 0]):
            row = rows + (token - firsts[t, 0]) * 2 * dim * 4
            fill(job, layer, head, token, row)
            src, dst = base + values[token, 0], base + values[token, 1]
            for c in range(0, dim, 16):
                prefetch(src + c * size + ahead)
                value = add(read(src + c * size), factor(row + (dim + c) * 4))
                if past_caches:
                    stream(dst + c * size, value)
                else:
                    write(dst + c * size, value)
        for c in range(0, dim, 16):
            transpose(rows + c * 4, 2 * dim * 4, keys + c * line, line)

    @njit
    def body(job, item):  # type: ignore[no-untyped-def]
        bases, bounds = table(job.bases, job.layers, 1), table(job.block_bounds, job.groups + 1, 1)
        group, begin, end = layers_of(job, item)
        space = np.zeros(4 * 16 * job.head_dim + 16, np.float32)
        rows = (space.ctypes.data + line - 1) // line * line
        keys = rows + 2 * job.head_dim * line
        others = keys + job.head_dim * line
        lo, hi = bounds[group, 0], bounds[group + 1, 0]
        for layer in range(begin, end):
            for head in range(job.heads):
                base = bases[layer, 0] + head * job.head_bytes
                ahead = ahead_of(job, layer, end, head)
                for t in range(lo, hi, 2):
                    u = min(t + 1, hi - 1)
                    deviate(job, base, layer, head, t, ahead, rows, keys)
                    if t < u:
                        deviate(job, base, layer, head, u, ahead, rows, others)
                    finish(job, base, t, u, ahead, keys, others)

    return compile_kernel(body, JOB, "finish", kind, arena_kind)
