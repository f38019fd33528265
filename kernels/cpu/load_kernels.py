# SPDX-License-Identifier: Apache-2.0
"""The compiled load kernels, and the vector steps they are made of.

Memory is the limit: the same place of the next head or layer is prefetched (pages are scattered,
which defeats the hardware's prefetcher), and whole blocks are stored past the caches, which saves
reading what is about to be overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from numba import njit

from kvcomm_vllm.kernels.cpu import lanes as lane
from kvcomm_vllm.kernels.cpu.threads import compile_kernel, job_type, table
from kvcomm_vllm.kernels.pages import Packing

JOB = job_type(
    *("bases", "layers", "layer_step", "heads", "head_bytes", "groups"),
    *("blocks", "block_count", "block_bounds", "values", "value_count", "value_bounds"),
    *("factors", "rows", "pairs", "first_step", "second_step", "row_bytes"),
    *("value_rows", "value_row_bytes", "stream"),
)


@dataclass(frozen=True)
class Steps:
    """Numba functions on one 16-lane block; ``block`` is a row of ``Tables.blocks``.

    Attributes:
        turn: ``(base, a, b, factors, block, ahead)`` turns rows a and b (byte offsets):
            ``(a + ib)(cos + i sin)``.
        turn_adjacent: ``(base, a, factors, block, ahead)`` turns lanes 2i and 2i + 1.
        keep: ``(base, a, block, ahead)`` copies row a.
    """

    turn: Any
    turn_adjacent: Any
    keep: Any


@cache
def block_access(kind: str) -> tuple[Any, Any]:
    """``fetch(base, row, block, ahead) -> lanes`` and ``put(address, lanes, block)``."""
    memory, width, prefetch = lane.MEMORY[kind], lane.WIDTH, lane.prefetch
    read, join, size = memory.read, memory.join, memory.size
    write, stream, write_first = memory.write, memory.stream, memory.write_first

    @njit
    def fetch(base, a, block, ahead):  # type: ignore[no-untyped-def]
        first, second = base + block[1] + a, base + block[2] + a
        in_first, count = block[3], block[4]
        prefetch(first + ahead)
        if in_first < count:
            prefetch(second + in_first * size + ahead)
        if in_first == width:
            return read(first)
        return join(first, second, in_first, count)

    @njit
    def put(address, value, block):  # type: ignore[no-untyped-def]
        if block[4] < width:
            write_first(address + block[0], value, block[4])
        elif block[5]:
            stream(address + block[0], value)
        else:
            write(address + block[0], value)

    return fetch, put


@njit
def entry(blocks, i):  # type: ignore[no-untyped-def]
    """Row i of ``Tables.blocks`` as a tuple."""
    first, second = blocks[i, 1], blocks[i, 2]
    return blocks[i, 0], first, second, blocks[i, 3], blocks[i, 4], blocks[i, 5]


@cache
def rotation() -> Any:
    """``(x, y, factors) -> (x, y)``: ``(x + iy)(cos + i sin)``; 16 cos, then 16 sin."""
    factor, line = lane.MEMORY["fp32"].read, 4 * lane.WIDTH
    fused, multiply, negate = lane.fused, lane.multiply, lane.negate

    @njit
    def rotate(x, y, factors):  # type: ignore[no-untyped-def]
        c, s = factor(factors), factor(factors + line)
        return fused(x, c, negate(multiply(y, s))), fused(y, c, multiply(x, s))

    return rotate


@cache
def steps(kind: str) -> Steps:
    """Steps for a storage kind ``bf16``, ``fp16`` or ``fp32``."""
    fetch, put = block_access(kind)
    factor, line = lane.MEMORY["fp32"].read, 4 * lane.WIDTH
    fused, multiply, swap, rotate = lane.fused, lane.multiply, lane.swap, rotation()

    @njit
    def turn(base, a, b, factors, block, ahead):  # type: ignore[no-untyped-def]
        x, y = fetch(base, a, block, ahead), fetch(base, b, block, ahead)
        x, y = rotate(x, y, factors)
        put(base + a, x, block)
        put(base + b, y, block)

    @njit
    def turn_adjacent(base, a, factors, block, ahead):  # type: ignore[no-untyped-def]
        x = fetch(base, a, block, ahead)
        c, s = factor(factors), factor(factors + line)
        put(base + a, fused(x, c, multiply(swap(x), s)), block)

    @njit
    def keep(base, a, block, ahead):  # type: ignore[no-untyped-def]
        put(base + a, fetch(base, a, block, ahead), block)

    return Steps(turn, turn_adjacent, keep)


@cache
def copy_bytes() -> Any:
    """``(src, dst, bytes, ahead, past_caches)``: copies a multiple of 4 contiguous bytes."""
    words, prefetch, line = lane.MEMORY["fp32"], lane.prefetch, 4 * lane.WIDTH
    read, join, write = words.read, words.join, words.write
    stream, write_first = words.stream, words.write_first

    @njit
    def copy(src, dst, count, ahead, past_caches):  # type: ignore[no-untyped-def]
        whole = count - count % line
        for at in range(0, whole, line):
            prefetch(src + at + ahead)
            if past_caches:
                stream(dst + at, read(src + at))
            else:
                write(dst + at, read(src + at))
        if whole < count:
            rest = (count - whole) // 4
            write_first(dst + whole, join(src + whole, src + whole, rest, rest), rest)

    return copy


@cache
def _move_values(packing: Packing) -> Any:
    """``(job, base, values, entry, ahead)``: one entry of ``Tables.values``."""
    copy = copy_bytes()
    words, prefetch, pack = lane.MEMORY["fp32"], lane.prefetch, lane.pack_halves
    read, write = words.read, words.write

    @njit
    def move_run(job, base, values, r, ahead):  # type: ignore[no-untyped-def]
        copy(base + values[r, 0], base + values[r, 1], values[r, 2], ahead, job.stream)

    @njit
    def move_line(job, base, values, r, ahead):  # type: ignore[no-untyped-def]
        for row in range(job.value_rows):
            at = base + row * job.value_row_bytes
            even, odd = at + values[r, 1], at + values[r, 3]
            prefetch(even + ahead)
            prefetch(odd + ahead)
            write(at + values[r, 0], pack(read(even), values[r, 2], read(odd), values[r, 4]))

    return move_run if packing is Packing.VEC else move_line


@cache
def load_kernel(kind: str, packing: Packing, adjacent: bool) -> Any:
    """``K_new = turn * K``, ``V_new = V``; an item is some layers of one destination page.

    Row pair j is made of rows ``first_step * j`` and ``first_step * j + second_step``; with
    ``adjacent`` it is row j alone, whose neighbouring lanes are the pairs.
    """
    step, move = steps(kind), _move_values(packing)
    turn, turn_adjacent, keep = step.turn, step.turn_adjacent, step.keep
    turned = 1 if adjacent else 2  # rows per row pair
    columns = 3 if packing is Packing.VEC else 5

    @njit
    def body(job, item):  # type: ignore[no-untyped-def]
        bases = table(job.bases, job.layers, 1)
        blocks = table(job.blocks, job.block_count, 6)
        block_bounds = table(job.block_bounds, job.groups + 1, 1)
        value_bounds = table(job.value_bounds, job.groups + 1, 1)
        values = table(job.values, job.value_count, columns)
        parts = (job.layers + job.layer_step - 1) // job.layer_step
        group, part = item // parts, item % parts
        begin, end = part * job.layer_step, min(job.layers, (part + 1) * job.layer_step)
        lo, hi = block_bounds[group, 0], block_bounds[group + 1, 0]
        row, pairs = job.row_bytes, job.pairs
        step_a, step_b, factor_bytes = job.first_step * row, job.second_step * row, pairs * 128
        for layer in range(begin, end):
            for head in range(job.heads):
                base, ahead = bases[layer, 0] + head * job.head_bytes, job.head_bytes
                if head == job.heads - 1 and layer + 1 < end:
                    ahead = bases[layer + 1, 0] - base
                for i in range(lo, hi, 2):
                    # Two blocks make a cache line of 16-bit values: written together, or what goes
                    # past the caches would be half lines.
                    j = min(i + 1, hi - 1)
                    x, y = entry(blocks, i), entry(blocks, j)
                    f, g = job.factors + i * factor_bytes, job.factors + j * factor_bytes
                    for pair in range(pairs):
                        a, at = pair * step_a, pair * 128
                        if adjacent:
                            turn_adjacent(base, a, f + at, x, ahead)
                            if i < j:
                                turn_adjacent(base, a, g + at, y, ahead)
                        else:
                            turn(base, a, a + step_b, f + at, x, ahead)
                            if i < j:
                                turn(base, a, a + step_b, g + at, y, ahead)
                    for other in range(turned * pairs, job.rows):
                        keep(base, other * row, x, ahead)
                        if i < j:
                            keep(base, other * row, y, ahead)
                for r in range(value_bounds[group, 0], value_bounds[group + 1, 0]):
                    move(job, base, values, r, ahead)

    return compile_kernel(body, JOB, "load", kind, packing, adjacent)
