# SPDX-License-Identifier: Apache-2.0
"""Sixteen fp32 lanes as a numba value: the few vector instructions the CPU kernels are written in.

Plain loops over pages do not vectorise reliably: source and destination lie in the same cache, so
LLVM must assume that every store may change the next load. These intrinsics emit vector IR, which
LLVM splits for narrower machines. Masked forms touch nothing outside their lanes.

All functions here are called from numba code only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.extending import intrinsic, models, register_model

WIDTH = 16  # one AVX-512 register of fp32

_I16, _I32, _F16, _F32 = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()
_HALVES, WORDS = ir.VectorType(_I16, WIDTH), ir.VectorType(_I32, WIDTH)
_FLOAT16S, FLOATS = ir.VectorType(_F16, WIDTH), ir.VectorType(_F32, WIDTH)


class _BrainType(ir.Type):
    """LLVM's ``bfloat``, which llvmlite has no name for."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BrainType)

    def __hash__(self) -> int:
        return hash("bfloat")


BRAIN = _BrainType()


def _has_bf16() -> bool:
    # Asked of what numba compiles for, since an instruction that is missing there ends the process.
    overridden = config.CPU_NAME is not None or config.CPU_FEATURES is not None
    if overridden or not config.ENABLE_AVX or llvmlite.binding.llvm_version_info[0] < 18:
        return False
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16", False))


HAS_BF16 = _has_bf16()  # conversions to bf16 and products of bf16 pairs are single instructions


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"Lanes{WIDTH}xfloat32")


lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)


def _all(vector: ir.VectorType, value: Any) -> ir.Constant:
    return ir.Constant(vector, [value] * WIDTH)


def splat(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, WIDTH), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _all(WORDS, 0))


def call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    signature = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def _below(builder: Any, count: Any) -> Any:
    """Mask of the lanes whose number is below ``count``."""
    index = ir.Constant(WORDS, list(range(WIDTH)))
    return builder.icmp_signed("<", index, splat(builder, builder.trunc(count, _I32)))


def _pointer(builder: Any, address: Any, vector: ir.VectorType) -> tuple[Any, Any, str]:
    """Typed pointer, element size in bytes and the suffix of LLVM's masked intrinsics."""
    wide = vector.element == _F32
    pointer = builder.inttoptr(address, vector.as_pointer())
    return pointer, ir.Constant(_I32, 4 if wide else 2), f"v{WIDTH}{'f32' if wide else 'i16'}.p0"


def load_vector(builder: Any, address: Any, vector: ir.VectorType) -> Any:
    pointer, size, _ = _pointer(builder, address, vector)
    return builder.load(pointer, align=size.constant)


def _load_masked(builder: Any, address: Any, mask: Any, others: Any) -> Any:
    vector = others.type
    pointer, size, name = _pointer(builder, address, vector)
    return call(builder, f"llvm.masked.load.{name}", vector, [pointer, size, mask, others])


def store_vector(builder: Any, address: Any, value: Any, stream: bool) -> None:
    pointer, size, _ = _pointer(builder, address, value.type)
    if stream and value.type == _HALVES:
        # LLVM has no store past the caches for bf16: the fence keeps it from storing as such.
        words = ir.VectorType(_F32, WIDTH // 2)
        value = call(builder, "llvm.arithmetic.fence.v8f32", words, [builder.bitcast(value, words)])
        pointer = builder.inttoptr(address, words.as_pointer())
    store = builder.store(value, pointer, align=size.constant * (WIDTH if stream else 1))
    if stream:
        note = builder.module.add_metadata([ir.Constant(_I32, 1)])
        store.set_metadata("nontemporal", note)


def _store_masked(builder: Any, address: Any, value: Any, mask: Any) -> None:
    pointer, size, name = _pointer(builder, address, value.type)
    call(builder, f"llvm.masked.store.{name}", ir.VoidType(), [value, pointer, size, mask])


def _widen(builder: Any, raw: Any, kind: str) -> Any:
    if kind == "fp32":
        return raw
    if kind == "fp16":
        return builder.fpext(builder.bitcast(raw, _FLOAT16S), FLOATS)
    return builder.bitcast(builder.shl(builder.zext(raw, WORDS), _all(WORDS, 16)), FLOATS)


def _narrow(builder: Any, value: Any, kind: str) -> Any:
    """Round to nearest even, as torch does; a NaN stays one."""
    if kind == "fp32":
        return value
    if kind == "fp16":
        return builder.bitcast(builder.fptrunc(value, _FLOAT16S), _HALVES)
    if HAS_BF16:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(BRAIN, WIDTH)), _HALVES)
    bits, sixteen = builder.bitcast(value, WORDS), _all(WORDS, 16)
    even = builder.and_(builder.lshr(bits, sixteen), _all(WORDS, 1))
    rounded = builder.add(bits, builder.add(even, _all(WORDS, 0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(is_nan, _all(WORDS, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, sixteen), _HALVES)


def _reader(kind: str) -> Any:
    vector = FLOATS if kind == "fp32" else _HALVES

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _widen(builder, load_vector(builder, args[0], vector), kind)

    return intrinsic(lambda tc, address: (lanes(types.int64), code))


def _joiner(kind: str) -> Any:
    vector = FLOATS if kind == "fp32" else _HALVES

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first, second, in_first, count = args
        below = _below(builder, in_first)
        raw = _load_masked(builder, first, below, _all(vector, 0))
        rest = builder.and_(builder.not_(below), _below(builder, count))
        return _widen(builder, _load_masked(builder, second, rest, raw), kind)

    int64 = types.int64
    return intrinsic(lambda tc, a, b, n, count: (lanes(int64, int64, int64, int64), code))


def _writer(kind: str, stream: bool) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store_vector(builder, args[0], _narrow(builder, args[1], kind), stream)
        return context.get_dummy_value()

    return intrinsic(lambda tc, address, x: (types.void(types.int64, lanes), code))


def _first_writer(kind: str) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _narrow(builder, args[1], kind)
        _store_masked(builder, args[0], value, _below(builder, args[2]))
        return context.get_dummy_value()

    return intrinsic(lambda tc, address, x, n: (types.void(types.int64, lanes, types.int64), code))


@dataclass(frozen=True)
class Memory:
    """Loads and stores of 16 elements of one storage kind; fp32 lanes, addresses in bytes.

    Attributes:
        size: bytes of one element.
        read: ``(address) -> lanes``.
        join: ``(first, second, in_first, count) -> lanes``: lane i < ``in_first`` from ``first``,
            the others below ``count`` from ``second``, each i elements behind its address.
        write: ``(address, lanes)``.
        stream: the same past the caches; the address is a multiple of 16 elements.
        write_first: ``(address, lanes, count)``, writes the first lanes only.
    """

    size: int
    read: Any
    join: Any
    write: Any
    stream: Any
    write_first: Any


MEMORY = {
    kind: Memory(
        4 if kind == "fp32" else 2,
        _reader(kind),
        _joiner(kind),
        _writer(kind, stream=False),
        _writer(kind, stream=True),
        _first_writer(kind),
    )
    for kind in ("bf16", "fp16", "fp32")
}


def _arithmetic(emit: Callable[..., Any]) -> tuple[Any, Any]:
    """Typing of one and of two operands for an instruction on lanes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit(builder, *args)

    return (
        intrinsic(lambda tc, x: (lanes(lanes), code)),
        intrinsic(lambda tc, x, y: (lanes(lanes, lanes), code)),
    )


def _swap(builder: Any, x: Any) -> Any:
    return builder.shuffle_vector(x, x, ir.Constant(WORDS, [i ^ 1 for i in range(WIDTH)]))


add = _arithmetic(lambda builder, x, y: builder.fadd(x, y))[1]
multiply = _arithmetic(lambda builder, x, y: builder.fmul(x, y))[1]
negate = _arithmetic(lambda builder, x: builder.fneg(x))[0]
absolute = _arithmetic(lambda builder, x: call(builder, f"llvm.fabs.v{WIDTH}f32", FLOATS, [x]))[0]
swap = _arithmetic(_swap)[0]  # exchanges lanes 2i and 2i + 1


@intrinsic
def fused(typing_context: Any, x: Any, y: Any, z: Any) -> Any:
    """``x * y + z``, rounded once where the machine can."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return call(builder, f"llvm.fmuladd.v{WIDTH}f32", FLOATS, args)

    return lanes(lanes, lanes, lanes), code


@intrinsic
def pack_halves(typing_context: Any, low: Any, low_at: Any, high: Any, high_at: Any) -> Any:
    """Per 32-bit lane: 16 bits of ``low`` from bit ``low_at``, then 16 of ``high`` likewise."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def half(value: Any, at: Any) -> Any:
            shift = splat(builder, builder.trunc(at, _I32))
            bits = builder.lshr(builder.bitcast(value, WORDS), shift)
            return builder.and_(bits, _all(WORDS, 0xFFFF))

        upper = builder.shl(half(args[2], args[3]), _all(WORDS, 16))
        return builder.bitcast(builder.or_(half(args[0], args[1]), upper), FLOATS)

    return lanes(lanes, types.int64, lanes, types.int64), code


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Starts fetching a cache line that is used once; one that is not mapped does no harm."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        hints = [ir.Constant(_I32, value) for value in (0, 0, 1)]  # for reading, used once, data
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *hints])
        return context.get_dummy_value()

    return types.void(types.int64), code


def _rounds(builder: Any, rows: list[Any]) -> list[Any]:
    """Transposes 16 lanes of 16 rows: log2(16) rounds that interleave row i with row i + 8."""
    for _ in range(4):
        low = ir.Constant(WORDS, [i // 2 + WIDTH * (i % 2) for i in range(WIDTH)])
        high = ir.Constant(WORDS, [8 + i // 2 + WIDTH * (i % 2) for i in range(WIDTH)])
        pairs = list(zip(rows[:8], rows[8:], strict=True))
        rows = [builder.shuffle_vector(a, b, order) for a, b in pairs for order in (low, high)]
    return rows


@intrinsic
def transpose(typing_context: Any, src: Any, src_step: Any, dst: Any, dst_step: Any) -> Any:
    """Transposes 16 x 16 fp32 values between addresses; steps are bytes from row to row."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def row(base: Any, step: Any, number: int) -> Any:
            return builder.add(base, builder.mul(step, ir.Constant(step.type, number)))

        rows = [load_vector(builder, row(args[0], args[1], i), FLOATS) for i in range(WIDTH)]
        for i, value in enumerate(_rounds(builder, rows)):
            store_vector(builder, row(args[2], args[3], i), value, stream=False)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64), code


@intrinsic
def spread(typing_context: Any, address: Any) -> Any:
    """All lanes = the fp32 value at the address."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], _F32.as_pointer()), align=4)
        return splat(builder, value)

    return lanes(types.int64), code


@intrinsic
def zero(typing_context: Any) -> Any:
    """All lanes = 0."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _all(FLOATS, 0.0)

    return lanes(), code


def probe() -> bool:
    """Compiles and runs a masked and a whole step; True if the machine does them right."""
    memory = MEMORY["bf16"]
    read, join, write, write_first = memory.read, memory.join, memory.write, memory.write_first

    @njit
    def double(address):  # type: ignore[no-untyped-def]
        write(address + 32, add(read(address), read(address)))
        write_first(address + 64, join(address, address + 32, 2, 3), 3)

    values = np.arange(3 * WIDTH, dtype=np.float32)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    double(stored.ctypes.data)
    after = (stored.astype(np.uint32) << 16).view(np.float32)
    expected = np.concatenate((values[:16], 2 * values[:16], [0, 1, 4], values[35:]))
    return bool((after == expected).all())
