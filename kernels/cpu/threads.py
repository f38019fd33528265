# SPDX-License-Identifier: Apache-2.0
"""Runs compiled CPU kernels on torch's own OpenMP threads.

A second pool beside torch's would fight it for the cores: OpenMP threads keep spinning for a while
after an operator, and vLLM pins each of them to a core, so threads that are started later (numba's
threading layers, a Python executor) inherit a mask of one core. ``GOMP_parallel`` is what torch's
own parallel loops are compiled to; looked up in the process it belongs to the library torch uses
(GNU's, or Intel's where that is preloaded), so kernels run on the same warm, pinned threads.
Where the symbol is missing (macOS) the kernel runs in the calling thread.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, from_dtype, njit, types
from numba.extending import intrinsic

from kvcomm_vllm.kernels.cpu.stored import Kernel, compile_stored

Job = np.dtype[Any]

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_BYTES_PER_THREAD = 256 << 10  # moved in about 20 us, what it takes to wake a team


def job_type(*fields: str) -> Job:
    """Record of int64 fields (sizes, addresses) a kernel is called with, after two of its own.

    ``next`` is the first item nobody has taken yet, ``items`` their number.
    """
    return np.dtype([(name, np.int64) for name in ("next", "items", *fields)])


def compile_kernel(body: Any, job: Job, *form: object) -> Kernel:
    """``body(job, item)``, a numba function, as a C function that takes items until none is left.

    Items are handed out one by one, so a thread the system holds up delays nobody else's share.

    Args:
        form: the kernel's name, and what its code depends on besides its source.
    """
    record = from_dtype(job)

    def kernel(pointer):  # type: ignore[no-untyped-def]
        shared = carray(pointer, 1)[0]
        item = take(pointer)
        while item < shared.items:
            body(shared, item)
            item = take(pointer)
        publish(pointer)

    return compile_stored(kernel, types.void(types.CPointer(record)), form)


def share(groups: int, layers: int) -> int:
    """Layers per item when items are (group, some layers): few enough that all threads get work."""
    parts = min(layers, -(-4 * torch.get_num_threads() // max(groups, 1)))
    return -(-layers // parts)


def run(kernel: Kernel, job: Job, items: int, *, work_bytes: int, **fields: int) -> None:
    """Call a compiled kernel once per thread of torch's pool; returns when all items are done.

    Args:
        work_bytes: what all items read and write together; a little is not worth a team of threads.
        fields: the rest of the job; the caller keeps every array alive whose address it passes.
    """
    record = np.array([(0, items, *(fields[name] for name in (job.names or ())[2:]))], dtype=job)
    enough = -(-work_bytes // _BYTES_PER_THREAD)
    threads, team = min(torch.get_num_threads(), items, enough), _team()
    if threads <= 1 or team is None:
        _FUNCTION(kernel.address)(record.ctypes.data)
    else:
        team(kernel.address, record.ctypes.data, threads, 0)


@cache
def _team() -> Any:
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@intrinsic
def take(typing_context: Any, pointer: Any) -> Any:
    """Atomically increments ``next`` and returns its old value."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = context.get_constant(types.int64, 1)
        first = builder.bitcast(args[0], one.type.as_pointer())
        return builder.atomic_rmw("add", first, one, "monotonic")

    return types.int64(pointer), code


@intrinsic
def publish(typing_context: Any, pointer: Any) -> Any:
    """Makes stores that went past the caches visible to the other threads."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(pointer), code


@intrinsic
def _words(typing_context: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.int64)))

    return types.CPointer(types.int64)(types.int64), code


@njit
def table(address, rows, columns):  # type: ignore[no-untyped-def]
    """The int64 array ``[rows, columns]`` at an address."""
    return carray(_words(address), (rows, columns))
