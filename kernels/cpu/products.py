# SPDX-License-Identifier: Apache-2.0
"""Matrix products in registers: sixteen sums of products at once, for the CPU kernels.

Operands are 32-bit *words*: one fp32 value, or on a CPU with bf16 instructions two bf16 values
whose products are added, which halves the work. Sums are fp32.

All functions here are called from numba code only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvcomm_vllm.kernels.cpu import lanes as lane
from kvcomm_vllm.kernels.cpu.lanes import FLOATS, WIDTH, call, load_vector, splat

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_BRAIN_PAIRS = ir.VectorType(lane.BRAIN, 2 * WIDTH)


def _behind(builder: Any, address: Any, distance: int) -> Any:
    return builder.add(address, ir.Constant(_I64, distance))


def _multiply_add(builder: Any, total: Any, x: Any, y: Any, paired: bool) -> Any:
    if not paired:
        floats = [builder.bitcast(value, FLOATS) for value in (x, y)]
        return call(builder, f"llvm.fmuladd.v{WIDTH}f32", FLOATS, [*floats, total])
    pairs = [builder.bitcast(value, _BRAIN_PAIRS) for value in (x, y)]
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [total, *pairs])


@cache
def products(paired: bool, sum_step: int, scalar_step: int) -> Any:
    """``(sums, vectors, vector_step, scalars, step, count)``, addresses and bytes:

        sums[i] += sum over k < count of scalars[k, i] * vectors[k]        i = 0..15

    ``sums[i]`` are 16 fp32 at ``sums + i * sum_step``, ``vectors[k]`` 16 words at ``vectors + k *
    vector_step``, ``scalars[k, i]`` the word at ``scalars + k * step + i * scalar_step``.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, vectors, vector_step, scalars, step, count = args
        places = [_behind(builder, sums, i * sum_step) for i in range(WIDTH)]
        starts = [load_vector(builder, place, FLOATS) for place in places]
        before = builder.block
        loop = builder.append_basic_block("products")
        after = builder.append_basic_block("products_end")
        builder.branch(loop)
        builder.position_at_end(loop)
        k, vector, scalar = (builder.phi(_I64) for _ in range(3))
        totals = [builder.phi(FLOATS) for _ in range(WIDTH)]
        x = load_vector(builder, vector, FLOATS)
        results = []
        for i, total in enumerate(totals):
            pointer = builder.inttoptr(_behind(builder, scalar, i * scalar_step), _I32.as_pointer())
            y = splat(builder, builder.load(pointer, align=4))
            results.append(_multiply_add(builder, total, x, y, paired))
        steps = [builder.add(k, ir.Constant(_I64, 1)), builder.add(vector, vector_step)]
        steps.append(builder.add(scalar, step))
        builder.cbranch(builder.icmp_signed("<", steps[0], count), loop, after)
        firsts = [ir.Constant(_I64, 0), vectors, scalars, *starts]
        for phi, first, later in zip(
            [k, vector, scalar, *totals], firsts, [*steps, *results], strict=True
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(later, loop)
        builder.position_at_end(after)
        for place, result in zip(places, results, strict=True):
            lane.store_vector(builder, place, result, stream=False)
        return context.get_dummy_value()

    int64 = types.int64
    return intrinsic(
        lambda tc, a, b, c, d, e, f: (types.void(int64, int64, int64, int64, int64, int64), code)
    )


@intrinsic
def write_pairs(typing_context: Any, address: Any, x: Any, y: Any) -> Any:
    """Sixteen words at the address, lane i of them (x[i], y[i]) rounded to bf16."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, x, y = args
        order = ir.Constant(
            ir.VectorType(_I32, 2 * WIDTH), [i // 2 + WIDTH * (i % 2) for i in range(2 * WIDTH)]
        )
        both = builder.shuffle_vector(x, y, order)
        pairs = builder.bitcast(builder.fptrunc(both, _BRAIN_PAIRS), FLOATS)
        lane.store_vector(builder, address, pairs, stream=False)
        return context.get_dummy_value()

    return types.void(types.int64, lane.lanes, lane.lanes), code
