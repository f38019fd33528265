# SPDX-License-Identifier: Apache-2.0
"""Writes the generated tables of docs/kernels.md: resources, roofline estimate, CPU measurements.

    python tools/kernel_report.py            rewrite the tables
    python tools/kernel_report.py --check    exit 1 if they are out of date

Kernels are compiled for GPUs that need not be there; nothing is run. The measurements are read from
docs/results/cpu_load.json and cpu_kernels.json, which benchmarks/cpu_load.py and kernels.py write.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_inspection.compiled import Compiled, compile_for
from kernel_inspection.traffic import bytes_per_row
from kernel_inspection.variants import (
    ANCHORS,
    Shape,
    Variant,
    all_variants,
    code_variant,
    collect_variant,
    distance_variant,
    load_variant,
    sum_variant,
)
from rich.progress import track

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "kernels.md"
CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Gpu:
    """Data-sheet memory rate and an assumed L2 rate, TB/s; data-sheet rate of bf16 products."""

    name: str
    capability: int
    memory_tb_s: float
    l2_tb_s: float
    tflops: float


@dataclass(frozen=True)
class Model:
    """KV shape of one rank."""

    name: str
    layers: int
    heads: int
    head_dim: int = 128


GPUS = (Gpu("H100 SXM", 90, 3.35, 5.5, 989), Gpu("A100 80 GB SXM", 80, 2.04, 4.0, 312))
MODELS = (Model("8B", 32, 8), Model("70B", 80, 8), Model("70B, TP 8", 80, 1))
TOKENS = 2048
REACHED = 0.85  # share of the data-sheet rate that a plain copy reaches
REACHED_FLOPS = 0.3  # of small products that wait for their operands


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def resource_row(variant: Variant, codes: dict[int, Compiled]) -> list[str]:
    """One line: registers and spills on each architecture, access widths and bytes on Hopper."""
    hopper = codes[90]
    narrow = sum(width < 16 for width in hopper.loads + hopper.stores)
    wide = len(hopper.loads) + len(hopper.stores) - narrow
    moved = bytes_per_row(variant, hopper)
    own = moved - variant.shared - variant.repeated
    ratio = f"{own / variant.minimum:.2f}" if variant.power_of_two else "masked"
    through_l2 = f"{moved / variant.minimum:.2f}" if variant.power_of_two else "masked"
    registers = "/".join(str(codes[c].registers) for c in CAPABILITIES)
    spills = "/".join(str(codes[c].spill_bytes) for c in CAPABILITIES)
    shared = f"{hopper.shared_bytes / 1024:.0f}"
    name = variant.name
    return [name, registers, spills, shared, f"{wide} + {narrow}", f"{variant.minimum:.0f}", ratio,
            through_l2]  # fmt: skip


def resources() -> str:
    """The resource table; takes about a minute."""
    rows = []
    for variant in track(list(all_variants()), description="compiling", transient=True):
        codes = {c: compile_for(variant.launch, c) for c in CAPABILITIES}
        rows.append(resource_row(variant, codes))
    head = ["variant", "registers", "spills", "shared KiB", "16-byte + narrower", "minimum B",
            "own / min", "all / min"]  # fmt: skip
    return table(head, rows)


def estimate(variant: Variant, model: Model, gpu: Gpu) -> tuple[float, str]:
    """Milliseconds for TOKENS tokens and what limits them: device memory, L2 where codes are read,
    or arithmetic.

    Device memory moves each row's own bytes, what all programs of a layer share once, and the
    rotation factors once; L2 moves all that programs request.
    """
    rows = TOKENS * model.layers * model.heads
    code = compile_for(variant.launch, gpu.capability)
    requested = bytes_per_row(variant, code)
    own = requested - variant.shared - variant.repeated
    once = variant.shared * variant.rows / (model.heads * TOKENS)
    limits = {
        "memory": rows * (own + once) / (REACHED * gpu.memory_tb_s * 1e12),
        "L2": rows * requested / (gpu.l2_tb_s * 1e12),
        "arithmetic": rows * 2 * variant.products / (REACHED_FLOPS * gpu.tflops * 1e12),
    }
    limit = max(limits, key=limits.__getitem__)
    return 1e3 * limits[limit], limit


def roofline() -> str:
    """The estimate per kernel, GPU and model."""
    rows = []
    for model in MODELS:
        shape = Shape(heads=model.heads, head_dim=model.head_dim, layers=model.layers)
        variants = (
            load_variant(shape),
            sum_variant(shape, ANCHORS),
            sum_variant(shape, 0),
            code_variant(shape),
            collect_variant(shape),
            distance_variant(shape),
        )
        for variant in variants:
            row = [model.name, variant.name.rsplit(", ", 1)[0]]
            for gpu in GPUS:
                ms, limit = estimate(variant, model, gpu)
                row.append(f"{ms:.3f} ({limit})")
            rows.append(row)
    return table(["model", "kernel", *(f"{gpu.name}, ms" for gpu in GPUS)], rows)


def measured_loads() -> str:
    """The table of ``benchmarks/cpu_load.py``."""
    report = json.loads((DOCS / "results" / "cpu_load.json").read_text())
    rows = [
        [row["name"], f"{row['ms']:.2f}", f"{row['gb_per_s']:.1f}", f"{row['share_of_copy']:.0%}",
         f"{row['times_first']:.1f}"]
        for row in report["rows"]
    ]  # fmt: skip
    return table(["", "ms", "GB/s", "of a copy's speed", "times the first version"], rows)


def measured_kernels() -> str:
    """The table of ``benchmarks/kernels.py`` on a CPU."""
    report = json.loads((DOCS / "results" / "cpu_kernels.json").read_text())
    rows = [
        [row["kernel"], row["provider"], f"{row['ms']:.2f}", f"{row['bytes'] / 1e6:.0f}",
         f"{row['share_of_copy']:.0%}"]
        for row in report["rows"]
    ]  # fmt: skip
    return table(["kernel", "provider", "ms", "MB", "of a copy's speed"], rows)


def replace(text: str, name: str, body: str) -> str:
    """The text with what lies between the markers of one generated table replaced."""
    begin, end = f"<!-- generated: {name} -->\n", f"<!-- end: {name} -->"
    before, rest = text.split(begin, 1)
    return before + begin + body + "\n" + end + rest.split(end, 1)[1]


TABLES: dict[str, Callable[[], str]] = {
    "cpu loads": measured_loads,
    "cpu kernels": measured_kernels,
    "resources": resources,
    "roofline": roofline,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="change nothing, report drift")
    args = parser.parse_args()
    text = PAGE.read_text()
    made = text
    for name, make in TABLES.items():
        made = replace(made, name, make())
    if not args.check:
        PAGE.write_text(made)
        return 0
    if made != text:
        print("docs/kernels.md is out of date: run python tools/kernel_report.py", file=sys.stderr)
    return int(made != text)


if __name__ == "__main__":
    sys.exit(main())
