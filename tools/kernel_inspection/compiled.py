# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for a GPU that is not there: registers, spills, vector widths, bytes moved.

Used by the compile tests, by ``tools/kernel_report.py`` and by the benchmark's byte counts.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel; ``aligned`` arguments are multiples of 16."""

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    num_warps: int


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one specialisation.

    Args:
        registers, spill_bytes, shared_bytes: per thread, per thread, per block (ptxas).
        loads, stores: width in bytes of each global access instruction, per thread.
        ttir: Triton's own intermediate code, from which bytes are counted.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    ttir: str


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile for an NVIDIA compute capability (80, 90, 100) without a device.

    Raises:
        RuntimeError: ptxas rejects the code.
    """
    names = launch.kernel.arg_names
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    attrs = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in launch.aligned
    }
    source = ASTSource(launch.kernel, signature, dict(launch.constants), attrs)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": True}
    binary = triton.compile(source, target=target, options=options)
    registers, spills = _ptxas(binary.asm["ptx"])
    return Compiled(
        registers=registers,
        spill_bytes=spills,
        shared_bytes=int(binary.metadata.shared),
        loads=_widths(binary.asm["ptx"], "ld"),
        stores=_widths(binary.asm["ptx"], "st"),
        ttir=binary.asm["ttir"],
    )


def _ptxas(ptx: str) -> tuple[int, int]:
    from triton.backends.nvidia.compiler import get_ptxas

    match = re.search(r"\.target\s+sm_(\w+)", ptx)
    assert match is not None, "PTX names its target"
    arch = match[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        tool = get_ptxas(int(re.sub(r"\D", "", arch))).path
        done = subprocess.run(
            [
                tool,
                "-v",
                "--regAllocOptLevel=2",
                f"--gpu-name=sm_{arch}",
                str(path),
                "-o",
                f"{path}.cubin",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert registers is not None, done.stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    return int(registers[1]), sum(map(int, spills))


def _widths(ptx: str, op: str) -> tuple[int, ...]:
    """Bytes of every ``ld.global``/``st.global``/``cp.async`` instruction in the code."""
    widths = []
    for line in ptx.splitlines():
        found = re.search(rf"\b{op}\.global((?:\.\w+(?:::\w+)*)*)\s", line)
        if found:
            vector = re.search(r"\.v(\d)", found[1])
            bits = re.search(r"\.[bsuf](\d+)", found[1])
            assert bits is not None, line
            widths.append(int(bits[1]) // 8 * (int(vector[1]) if vector else 1))
        elif op == "ld" and re.search(r"cp\.async\.c[ag]\.", line):
            size = re.search(r"\],\s*(0x\w+|\d+)", line)
            assert size is not None, line
            widths.append(int(size[1], 0))
    return tuple(widths)
