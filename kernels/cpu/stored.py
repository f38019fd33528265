# SPDX-License-Identifier: Apache-2.0
"""Compiled CPU kernels are kept on disk, where numba keeps its own: a server that starts again does
not compile them again, which takes 20 s on a slow core.

numba's own files are not used: processes that store at the same time write over each other's, and
functions are named by numbers that start anew in every process. Here a file is named after what it
holds, says so inside, and its code is loaded into a place of its own.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core.caching import CompileResultCacheImpl
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target

_DIGEST = 32  # bytes of a sha256


class Kernel(NamedTuple):
    """A C function ``void(void *)``; its code stays as long as this does.

    Args:
        stored: True if it came from the disk.
    """

    address: int
    code: Any
    stored: bool


def compile_stored(function: Any, signature: Any, form: tuple[object, ...]) -> Kernel:
    """A C function of a Python function, from the disk if it has been compiled before.

    Args:
        signature: numba's.
        form: what tells this function from others of all kernels' sources.
    """
    try:
        folder = Path(CompileResultCacheImpl(function).locator.get_cache_path())
    except RuntimeError:  # numba knows no place that can be written to
        return _compile(function, signature)
    file = folder / _name(form)
    try:
        return _load(file)
    except (OSError, ValueError, RuntimeError):  # not there, not whole, or not for this machine
        kernel = _compile(function, signature)
        _save(file, kernel.code)
        return kernel


def _compile(function: Any, signature: Any) -> Kernel:
    compiled = CFunc(function, (signature.args, signature.return_type), locals={}, options={})
    compiled.compile()
    return Kernel(compiled.address, compiled, stored=False)


def _name(form: tuple[object, ...]) -> str:
    """Of form and machine, then of what may change: the sources and who compiles them."""
    machine = cpu_target.target_context.codegen().magic_tuple()
    compiler = numba.__version__, llvmlite.__version__
    return f"kvcomm-{_hex(form, machine)}.{_hex(_sources(), compiler)}.kernel"


def _hex(*parts: object) -> str:
    return sha256(repr(parts).encode()).hexdigest()[:32]


@cache
def _sources() -> str:
    """Of all kernels: they share their parts."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _seal(file: Path, content: bytes) -> bytes:
    return sha256(file.name.encode() + content).digest()


def _load(file: Path) -> Kernel:
    """
    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, or belongs to another kernel.
        RuntimeError: LLVM does not take it.
    """
    sealed = file.read_bytes()
    content = sealed[_DIGEST:]
    if sealed[:_DIGEST] != _seal(file, content):
        raise ValueError(file)
    name, code = content.split(b"\0", 1)
    # An engine of its own: one engine takes functions of one name for the same.
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(name.decode())
    if not address:
        raise ValueError(file)
    return Kernel(address, engine, stored=True)


def _save(file: Path, compiled: CFunc) -> None:
    """In place of what older sources left; where nothing can be written, nothing is."""
    part = file.with_suffix(f".{uuid4().hex}")
    try:
        _, _, (code, _) = compiled._library.serialize_using_object_code()
        content = compiled.native_name.encode() + b"\0" + code
        part.write_bytes(_seal(file, content) + content)
        part.replace(file)
        for older in file.parent.glob(f"{file.name.split('.')[0]}.*.kernel"):
            if older != file:
                older.unlink(missing_ok=True)
    except Exception:  # the kernel is there, the next start compiles it again
        part.unlink(missing_ok=True)
