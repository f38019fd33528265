# SPDX-License-Identifier: Apache-2.0
"""Loading KV on the CPU against a plain copy of the same bytes, in one run.

    python benchmarks/cpu_load.py [--tokens 2048] [--page 32] [--json FILE]

The default shape is SmolLM2-135M: 30 layers, 3 KV heads, 64 channels, bf16. A span starts 5 tokens
into a source page and lands at the start of another, pages are scattered, and all providers take
turns, so that a busy machine is unfair to nobody. Milliseconds are medians; bytes are what the load
itself reads and writes, without the deviation's own tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kvcomm_vllm.cli.machine import cpu_model
from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.cpu import correct as cpu_correct
from kvcomm_vllm.kernels.cpu import load as cpu_load
from kvcomm_vllm.kernels.cpu import portable
from kvcomm_vllm.kernels.deviation import AnchorSum, Deviation, MeanMap
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation

SOURCE_OFFSET = 5
HEAD_TOKENS = 8  # tokens of a placeholder with a mean of their own
RANK = 32  # numbers of a code
FIRST = "load, naive torch"  # the first version of this load


@dataclass(frozen=True)
class Row:
    name: str
    ms: float
    best_ms: float
    gb_per_s: float
    share_of_copy: float
    times_first: float


@dataclass(frozen=True)
class Case:
    group: PageGroup
    src: torch.Tensor
    dst: torch.Tensor
    undo: Rotation
    redo: Rotation

    @property
    def bytes(self) -> int:
        cache = self.group.layers[0]
        token = cache.shape[1] * cache.shape[3] * cache.itemsize * len(self.group.layers)
        return 2 * token * len(self.src)


def make_case(args: argparse.Namespace) -> Case:
    generator = torch.Generator().manual_seed(args.seed)
    pages = 2 * (args.tokens // args.page + 2)
    shape = (pages, args.heads, args.page, 2 * args.dim)
    layers = tuple(torch.randn(shape, generator=generator).bfloat16() for _ in range(args.layers))
    slots = torch.arange(pages * args.page).view(pages, args.page)
    slots = slots[torch.randperm(pages, generator=generator)].view(2, -1)
    angle = 6 * torch.rand(args.tokens, args.dim // 2, generator=generator)
    later = angle + 1
    return Case(
        PageGroup(layers, Packing.VEC, args.dim, args.dim),
        slots[0, SOURCE_OFFSET:][: args.tokens].clone(),
        slots[1, : args.tokens].clone(),
        Rotation(angle.cos(), -angle.sin()),
        Rotation(later.cos(), later.sin()),
    )


def deviations(case: Case, anchors: int) -> dict[str, Deviation]:
    group, tokens = case.group, len(case.src)
    layers, heads, dim = len(group.layers) - 1, group.kv_heads, group.head_dim  # layer 0 has none
    mean_k, mean_v = (0.1 * torch.randn(HEAD_TOKENS + 1, layers, heads, dim) for _ in range(2))
    row = torch.arange(tokens).clamp(max=HEAD_TOKENS)
    code = torch.randn(tokens, layers, RANK)
    up = 0.02 * torch.randn(1, layers, heads, RANK, 2 * dim)
    entry = torch.zeros(tokens, dtype=torch.int32)

    def blend(count: int) -> AnchorSum:
        shape = (4 * tokens, layers, heads, dim)  # beyond the caches, whatever the anchors' number
        dk, dv = (torch.randn(shape).bfloat16() for _ in range(2))
        rows = (997 * torch.arange(count)[:, None] + torch.arange(tokens)) % len(dk)
        weights = torch.full((count, tokens), 1 / count)
        return AnchorSum(dk, dv, rows, weights, weights, 1)

    return {
        "mean": MeanMap(mean_k, mean_v, row, skip_layers=1),
        f"mean + rank {RANK} code": MeanMap(mean_k, mean_v, row, code, up, entry, 1),
        "1 anchor": blend(1),
        f"{anchors} anchors": blend(anchors),
    }


def naive_load(case: Case, turn: torch.Tensor) -> None:
    """The obvious way, and the first version of this load: unpack, turn as complex, pack."""
    group, half = case.group, case.group.head_dim // 2
    for layer in range(len(group.layers)):
        k, v = packing.read(group, layer, case.src)
        pairs = torch.complex(k[..., :half].contiguous(), k[..., half:].contiguous()) * turn
        packing.write(group, layer, case.dst, torch.cat((pairs.real, pairs.imag), dim=-1), v)


def providers(case: Case, anchors: int) -> dict[str, Callable[[], object]]:
    turn = case.undo.then(case.redo)
    as_complex = torch.complex(turn.cos, turn.sin)[:, None]
    source = torch.randn(case.bytes // 4).bfloat16()
    target = torch.empty_like(source)
    table: dict[str, Callable[[], object]] = {
        "plain copy": lambda: target.copy_(source),
        "load, compiled": lambda: cpu_load.load(case.group, case.src, case.dst, turn),
        "load, portable torch": lambda: portable.load(case.group, case.src, case.dst, turn),
        FIRST: lambda: naive_load(case, as_complex),
    }
    for name, deviation in deviations(case, anchors).items():
        table[f"corrected, {name}"] = lambda d=deviation: cpu_correct.load_corrected(  # type: ignore[misc]
            case.group, case.src, case.dst, case.undo, case.redo, d
        )
    return table


def measure(table: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for call in table.values():
        call()  # compiles
    for _ in range(repeats):
        for name, call in table.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def rows(case: Case, seconds: dict[str, list[float]]) -> list[Row]:
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        Row(
            name,
            1e3 * middle[name],
            1e3 * min(values),
            case.bytes / middle[name] / 1e9,
            middle["plain copy"] / middle[name],
            middle[FIRST] / middle[name],
        )
        for name, values in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    sizes = {"tokens": 2048, "page": 32, "layers": 30, "heads": 3, "dim": 64}
    for name, default in (*sizes.items(), ("anchors", 20), ("repeats", 15), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    case = make_case(args)
    result = rows(case, measure(providers(case, args.anchors), args.repeats))
    print(
        f"{args.tokens} tokens, {case.bytes / 1e6:.0f} MB read and written, "
        f"{args.threads} threads, torch {torch.__version__}, {cpu_model()}"
    )
    head = f"{'median ms':>10}{'best ms':>9}{'GB/s':>7}{'of copy':>9}{'times first':>13}"
    print(f"{'':32}{head}")
    for row in result:
        print(
            f"{row.name:32}{row.ms:10.2f}{row.best_ms:9.2f}{row.gb_per_s:7.1f}"
            f"{row.share_of_copy:9.0%}{row.times_first:13.1f}"
        )
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        report = {
            "settings": settings,
            "cpu": cpu_model(),
            "torch": torch.__version__,
            "rows": [asdict(r) for r in result],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
