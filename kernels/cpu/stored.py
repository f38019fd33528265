# SPDX-License-Identifier: Apache-2.0
"""Compiled CPU kernels are kept on disk, where numba keeps its own: a server that starts again does
not compile them again, which takes 20 s on a slow core.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc


def compile_stored(function: Any, signature: Any, form: tuple[object, ...]) -> Any:
    """A C function of a Python function, from the disk if it has been compiled before.

    Args:
        signature: numba's.
        form: what tells this function from others with the same code, whose closures differ.
    """
    compiled = _not_compiled(function, signature)
    try:
        compiled._cache = _Stored(function, form)
        compiled.compile()
    except Exception:  # nowhere to keep it, or what is kept is broken
        compiled = _not_compiled(function, signature)
        compiled.compile()
    return compiled


def _not_compiled(function: Any, signature: Any) -> Any:
    return CFunc(function, (signature.args, signature.return_type), locals={}, options={})


class _Stored(FunctionCache):
    """numba tells closures apart by pickling what they hold, which for compiled functions is
    another one in every process.
    """

    def __init__(self, function: Any, form: tuple[object, ...]) -> None:
        super().__init__(function)
        self._form = repr(form)

    def _index_key(self, signature: Any, codegen: Any) -> tuple[object, ...]:
        return signature, codegen.magic_tuple(), self._form, _sources()


@cache
def _sources() -> str:
    """Of all kernels: they share their parts."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
