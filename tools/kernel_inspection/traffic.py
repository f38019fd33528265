# SPDX-License-Identifier: Apache-2.0
"""Bytes a compiled kernel moves per row, counted from the loads and stores in its code."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kernel_inspection.compiled import Compiled
from kernel_inspection.variants import Variant

_CONSTANT = re.compile(r"%(\S+) = arith\.constant (-?\d+) : i\d+")
_FOR = re.compile(r"scf\.for \S+ = %(\S+) to %(\S+) step %(\S+)")
_ACCESS = re.compile(r"tt\.(load|store) .*: (?:tensor<([\dx]+)x)?!tt\.ptr<(\w+?)>")
_LOCATION = re.compile(r" loc\([^()]*\)$")
_BITS = re.compile(r"\d+$")


@dataclass(frozen=True)
class Access:
    """One load or store of a block: its elements, their size, how often a program executes it."""

    name: str
    elements: int
    itemsize: int
    times: int

    @property
    def bytes(self) -> int:
        """Bytes moved by one program."""
        return self.elements * self.itemsize * self.times


def accesses(compiled: Compiled, trips: tuple[int, ...] = ()) -> list[Access]:
    """Loads and stores of one program; branches count as taken, masked lanes as moved.

    Args:
        trips: iterations of the loops whose bounds are not constant, in order of appearance.
    """
    constants: dict[str, int] = {}
    unknown = list(trips)
    found: list[Access] = []
    open_blocks: list[int] = []
    for line in compiled.ttir.splitlines():
        text = _LOCATION.sub("", line.rstrip())
        if text.lstrip().startswith("}"):
            open_blocks.pop()
        if constant := _CONSTANT.search(text):
            constants[constant[1]] = int(constant[2])
        if access := _ACCESS.search(text):
            elements = 1
            for size in (access[2] or "1").split("x"):
                elements *= int(size)
            bits = _BITS.search(access[3])
            assert bits is not None, text
            times = 1
            for block in open_blocks:
                times *= block
            name = text.split("=")[0].strip() if access[1] == "load" else "store"
            found.append(Access(name, elements, int(bits[0]) // 8, times))
        if text.endswith("{"):
            open_blocks.append(_iterations(text, constants, unknown))
    return found


def _iterations(text: str, constants: dict[str, int], unknown: list[int]) -> int:
    loop = _FOR.search(text)
    if loop is None:
        return 1
    bounds = [constants.get(name) for name in loop.groups()]
    if None in bounds:
        return unknown.pop(0)
    start, stop, step = (int(bound or 0) for bound in bounds)
    return max(0, -(-(stop - start) // step))


def bytes_per_row(variant: Variant, compiled: Compiled) -> float:
    """Bytes per (token, layer, head) that programs request, repeated reads included."""
    return sum(a.bytes for a in accesses(compiled, variant.trips)) / variant.rows


def wide_accesses(variant: Variant, compiled: Compiled) -> tuple[int, int]:
    """Least number of 16-byte loads and stores per thread that the blocks of rows call for.

    Blocks with less than 16 bytes for every thread, and lists of numbers, are left out.
    """
    threads = 32 * variant.launch.num_warps
    counts = {"load": 0, "store": 0}
    for access in accesses(compiled, variant.trips):
        kind = "store" if access.name == "store" else "load"
        counts[kind] += access.elements * access.itemsize // (16 * threads)
    return counts["load"], counts["store"]
