# SPDX-License-Identifier: Apache-2.0
"""Compiled kernel of distances to anchors, for the VEC packing with whole lanes of channels."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from kvcomm_vllm.kernels.cpu import lanes as lane
from kvcomm_vllm.kernels.cpu.load_kernels import block_access, entry, rotation
from kvcomm_vllm.kernels.cpu.threads import compile_kernel, job_type, table

JOB = job_type(
    *("bases", "layers", "heads", "head_bytes", "head_dim"),
    *("blocks", "block_count", "first_token", "token_values", "tokens"),
    *("undo", "pairs", "first_step", "second_step", "row_bytes"),
    *("anchor_k", "anchor_v", "row_stride", "layer_stride", "head_stride"),
    *("anchor_rows", "anchors", "sums"),
)
LINE = 4 * lane.WIDTH  # bytes of 16 words


@cache
def _keys(kind: str) -> Any:
    """Unrotated K of a tile of one head, fp32 ``[16, head_dim]``; ``space`` is as large again."""
    fetch, _ = block_access(kind)
    store, transpose, rotate = lane.MEMORY["fp32"].write, lane.transpose, rotation()

    @njit
    def keys(job, base, t, space, out):  # type: ignore[no-untyped-def]
        block = entry(table(job.blocks, job.block_count, 6), t)
        turn, ahead, row = job.undo + t * job.pairs * 2 * LINE, job.head_bytes, job.row_bytes
        for pair in range(job.pairs):
            a = pair * job.first_step
            b = a + job.second_step
            x, y = fetch(base, a * row, block, ahead), fetch(base, b * row, block, ahead)
            x, y = rotate(x, y, turn)
            store(space + a * LINE, x)
            store(space + b * LINE, y)
            turn += 2 * LINE
        for a in range(2 * job.pairs, job.head_dim):
            store(space + a * LINE, fetch(base, a * row, block, ahead))
        for c in range(0, job.head_dim, 16):
            transpose(space + c * LINE, LINE, out + c * 4, job.head_dim * 4)

    return keys


@cache
def distance_kernel(kind: str, arena_kind: str) -> Any:
    """Adds up, lane by lane, ``sums`` ``[tokens, anchors, 3, 16]``: of |K - K_a|, of |V - V_a| and
    of (V - V_a)^2. An item is a tile, in all layers and heads, so nobody else writes its sums.
    """
    keys, words = _keys(kind), lane.MEMORY["fp32"]
    page, arena, factor, store = lane.MEMORY[kind], lane.MEMORY[arena_kind], words.read, words.write
    read, page_size, widen, arena_size = page.read, page.size, arena.read, arena.size
    add, fused, negate, absolute = lane.add, lane.fused, lane.negate, lane.absolute

    @njit
    def compare(job, at, own, total):  # type: ignore[no-untyped-def]
        """One token with one row of the arena; ``own`` is its K and V."""
        dim = job.head_dim
        sum_k, sum_v, square = factor(total), factor(total + LINE), factor(total + 2 * LINE)
        for c in range(0, dim, 16):
            near_k = widen(job.anchor_k + at + c * arena_size)
            near_v = widen(job.anchor_v + at + c * arena_size)
            dk = add(factor(own + c * 4), negate(near_k))
            dv = add(factor(own + (16 * dim + c) * 4), negate(near_v))
            sum_k, sum_v = add(sum_k, absolute(dk)), add(sum_v, absolute(dv))
            square = fused(dv, dv, square)
        store(total, sum_k)
        store(total + LINE, sum_v)
        store(total + 2 * LINE, square)

    @njit
    def body(job, t):  # type: ignore[no-untyped-def]
        bases, firsts = (
            table(job.bases, job.layers, 1),
            table(job.first_token, job.block_count + 1, 1),
        )
        places = table(job.token_values, job.tokens, 2)
        rows = table(job.anchor_rows, job.anchors, job.tokens)
        first, end, dim = firsts[t, 0], firsts[t + 1, 0], job.head_dim
        memory = np.empty(3 * 16 * dim + 16, np.float32)
        own = (memory.ctypes.data + LINE - 1) // LINE * LINE
        space = own + 2 * dim * LINE
        for layer in range(job.layers):
            for head in range(job.heads):
                base = bases[layer, 0] + head * job.head_bytes
                keys(job, base, t, space, own)
                for token in range(first, end):
                    source, out = base + places[token, 0], own + (16 + token - first) * dim * 4
                    for c in range(0, dim, 16):
                        store(out + c * 4, read(source + c * page_size))
                place = layer * job.layer_stride + head * job.head_stride
                for anchor in range(job.anchors):
                    for token in range(first, end):
                        row = rows[anchor, token]
                        if row >= 0:
                            compare(
                                job,
                                row * job.row_stride + place,
                                own + (token - first) * dim * 4,
                                job.sums + (token * job.anchors + anchor) * 3 * LINE,
                            )

    return compile_kernel(body, JOB, "distance", kind, arena_kind)
