# SPDX-License-Identifier: Apache-2.0
"""Every kernel against a plain copy of the same bytes, measured in the same run.

    python benchmarks/kernels.py [--shapes smollm2 8b] [--tokens 2048] [--json FILE]

On a CUDA machine: Triton against torch.compile and eager torch. On a CPU: the CPU path against
eager torch. Times are medians; providers of one operation take turns. GB/s counts what has to be
read and written once, so a provider that moves bytes twice shows half.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from kernel_cases import SHAPES, Run, Workload
from rich.console import Console
from rich.table import Table

from kvcomm_vllm.cli.machine import cpu_model

Row = dict[str, str | float | int]


def once_ms(run: Run, device: str) -> float:
    """Milliseconds of one call, measured on the device's own clock where it has one."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def median_ms(providers: Mapping[str, Run], device: str, repeats: int) -> dict[str, float]:
    """Medians of interleaved calls; providers that fail are left out, with the reason on screen."""
    working = dict(providers)
    for name, run in providers.items():
        try:
            run()
        except Exception as error:  # torch.compile may not support this platform
            Console(stderr=True).print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            del working[name]
    times: dict[str, list[float]] = {name: [] for name in working}
    for _ in range(repeats):
        for name, run in working.items():
            times[name].append(once_ms(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(args: argparse.Namespace, device: str) -> list[Row]:
    rows: list[Row] = []
    for name in args.shapes:
        work = Workload(SHAPES[name], args.tokens, args.page, device, args.seed)
        copy = work.copy()
        for operation in work.operations():
            runs = {"copy": copy.providers["torch"], **operation.providers}
            medians = median_ms(runs, device, args.repeats)
            copy_rate = copy.bytes / medians.pop("copy")
            for provider, ms in medians.items():
                rate = operation.bytes / ms
                rows.append(
                    {
                        "shape": name,
                        "kernel": operation.name,
                        "provider": provider,
                        "ms": round(ms, 4),
                        "bytes": operation.bytes,
                        "gb_per_s": round(rate / 1e6, 2),
                        "share_of_copy": round(rate / copy_rate, 3),
                    }
                )
    return rows


def show(rows: list[Row], title: str) -> None:
    table = Table("shape", "kernel", "provider", "ms", "MB", "GB/s", "of copy", title=title)
    for row in rows:
        table.add_row(
            str(row["shape"]),
            str(row["kernel"]),
            str(row["provider"]),
            f"{row['ms']:.3f}",
            f"{int(row['bytes']) / 1e6:.1f}",
            f"{row['gb_per_s']:.1f}",
            f"{float(row['share_of_copy']):.0%}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = ["smollm2"] if device == "cpu" else list(SHAPES)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=default)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--page", type=int, default=32 if device == "cpu" else 16)
    parser.add_argument("--repeats", type=int, default=7 if device == "cpu" else 50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    hardware = torch.cuda.get_device_name() if device == "cuda" else cpu_model()
    about = {
        "device": f"{device}: {hardware}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "tokens": args.tokens,
        "page": args.page,
        "repeats": args.repeats,
        "seed": args.seed,
    }
    rows = measure(args, device)
    show(rows, f"{args.tokens} tokens, pages of {args.page}, {about['device']}")
    if args.json:
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
