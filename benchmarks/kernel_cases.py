# SPDX-License-Identifier: Apache-2.0
"""What ``benchmarks/kernels.py`` measures: shapes, operations, and who provides them here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kvcomm_vllm.kernels import reference
from kvcomm_vllm.kernels.cpu import correct as cpu_correct
from kvcomm_vllm.kernels.cpu import distance as cpu_distance
from kvcomm_vllm.kernels.cpu import load as cpu_load
from kvcomm_vllm.kernels.cpu import portable
from kvcomm_vllm.kernels.deviation import AnchorSum, Deviation, MeanMap
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation

ANCHORS = 5
HEAD_TOKENS = 8  # tokens of a placeholder with a mean of their own
RANK = 32  # numbers of a code
Run = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A model's KV shape on one rank."""

    name: str
    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16


SHAPES = {
    "smollm2": Shape("smollm2", 30, 3, 64),
    "8b": Shape("8b", 32, 8, 128),
    "8b-fp8": Shape("8b-fp8", 32, 8, 128, torch.float8_e4m3fn),
    "70b-tp4": Shape("70b-tp4", 80, 2, 128),
}


@dataclass(frozen=True)
class Operation:
    """One kernel's work at one shape; ``bytes`` is what has to be read and written once."""

    name: str
    bytes: int
    providers: dict[str, Run]


class Workload:
    """Pages, slots, rotations and deviations of one shape, and the operations on them.

    Args:
        tokens: reused tokens; they start 5 tokens into scattered source pages.
        page: tokens per page.
    """

    def __init__(self, shape: Shape, tokens: int, page: int, device: str, seed: int) -> None:
        self.shape, self.tokens, self.device = shape, tokens, device
        self.rng = torch.Generator().manual_seed(seed)
        pages = 2 * (-(-tokens // page) + 1)
        size = (pages, shape.heads, page, 2 * shape.head_dim)
        packing = Packing.VEC if device == "cpu" else Packing.STRIDED
        layers = []
        for _ in range(shape.layers):
            cache = torch.empty(size, dtype=torch.float32, device=device).normal_()
            layers.append(cache.to(shape.dtype))
        self.group = PageGroup(tuple(layers), packing, shape.head_dim, shape.head_dim)
        order = torch.randperm(pages, generator=self.rng)
        places = torch.arange(tokens + 5)
        half = pages // 2
        self.src = (order[places // page] * page + places % page)[5:].to(device)
        self.dst = (order[half + places // page] * page + places % page)[:tokens].to(device)
        self.undo, self.redo = self._rotation(), self._rotation()

    def _rotation(self) -> Rotation:
        angle = torch.rand(self.tokens, self.shape.head_dim // 2, generator=self.rng) * 6.28
        return Rotation(angle.cos().to(self.device), angle.sin().to(self.device))

    def _random(self, *size: int) -> torch.Tensor:
        return torch.empty(size, device=self.device).normal_(0, 0.1).bfloat16()

    @property
    def row_bytes(self) -> int:
        """Bytes of the span's K and V in the cache."""
        s = self.shape
        return 2 * s.head_dim * s.dtype.itemsize * s.heads * s.layers * self.tokens

    @property
    def arena_bytes(self) -> int:
        """Bytes of as many rows in a bf16 arena."""
        return self.row_bytes * 2 // self.shape.dtype.itemsize

    def anchors(self) -> AnchorSum:
        """Five anchors of the span's length."""
        s, rows = self.shape, ANCHORS * self.tokens
        dk, dv = (self._random(rows, s.layers, s.heads, s.head_dim) for _ in "kv")
        table = torch.arange(rows, device=self.device).reshape(ANCHORS, self.tokens)
        weights = torch.full((ANCHORS, self.tokens), 1 / ANCHORS, device=self.device)
        return AnchorSum(dk, dv, table, weights, weights.clone())

    def means(self, rank: int) -> MeanMap:
        """The ``residual`` deviation; rank 0: without codes."""
        s = self.shape
        mean_k, mean_v = (
            self._random(HEAD_TOKENS + 1, s.layers, s.heads, s.head_dim) for _ in "kv"
        )
        row = torch.arange(self.tokens, device=self.device).clamp(max=HEAD_TOKENS)
        if not rank:
            return MeanMap(mean_k, mean_v, row)
        code = self._random(self.tokens, s.layers, rank).float()
        up = self._random(1, s.layers, s.heads, rank, 2 * s.head_dim)
        up = up.float() if self.device == "cpu" else up
        entry = torch.zeros(self.tokens, dtype=torch.int32, device=self.device)
        return MeanMap(mean_k, mean_v, row, code, up, entry)

    def copy(self) -> Operation:
        """A plain copy of as many bytes: what memory allows."""
        source = torch.zeros(self.row_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return Operation("copy", 2 * self.row_bytes, {"torch": lambda: target.copy_(source)})

    def operations(self) -> Iterator[Operation]:
        """Every kernel, with every provider there is on this device."""
        yield self._load()
        yield self._corrected("load + anchors", self.anchors(), ANCHORS * self.arena_bytes)
        head = min(1.0, HEAD_TOKENS / self.tokens) * self.arena_bytes
        yield self._corrected("load + mean", self.means(0), int(head))
        coded = self.means(RANK)
        extra = int(head) + sum(part.nbytes for part in (coded.code, coded.up) if part is not None)
        yield self._corrected(f"load + mean + code of rank {RANK}", coded, extra)
        yield self._distance()
        yield self._collect()

    def _load(self) -> Operation:
        turn = self.undo.then(self.redo)
        arguments = (self.group, self.src, self.dst, turn)
        providers: dict[str, Run] = {"eager": lambda: portable.load(*arguments)}
        if self.device == "cpu":
            if cpu_load.available() and cpu_load.supports(self.group):
                cpu_load.warm_up(self.group)
                providers = {"cpu": lambda: cpu_load.load(*arguments), **providers}
        else:
            from kvcomm_vllm.kernels import load

            compiled = torch.compile(reference.load)
            providers = {
                "triton": lambda: load.load(*arguments),
                "compile": lambda: compiled(*arguments),
                **providers,
            }
        return Operation("load", 2 * self.row_bytes, providers)

    def _corrected(self, name: str, change: Deviation, extra: int) -> Operation:
        arguments = (self.group, self.src, self.dst, self.undo, self.redo, change)
        providers: dict[str, Run] = {"eager": lambda: reference.load_corrected(*arguments)}
        if self.device == "cpu":
            if cpu_load.available() and cpu_correct.supports(self.group):
                cpu_correct.warm_up(self.group, change)
                providers = {"cpu": lambda: cpu_correct.load_corrected(*arguments), **providers}
        else:
            from kvcomm_vllm.kernels import correct

            compiled = torch.compile(reference.load_corrected)
            providers = {
                "triton": lambda: correct.load_corrected(*arguments),
                "compile": lambda: compiled(*arguments),
                **providers,
            }
        return Operation(name, 2 * self.row_bytes + extra, providers)

    def _distance(self) -> Operation:
        pool = self.anchors()
        arguments = (self.group, self.src, self.undo, pool.dk, pool.dv, pool.rows)
        providers: dict[str, Run] = {"eager": lambda: reference.distance(*arguments)}
        if self.device != "cpu":
            from kvcomm_vllm.kernels import distance

            providers = {"triton": lambda: distance.distance(*arguments), **providers}
        elif cpu_load.available() and cpu_correct.supports(self.group):
            cpu_distance.warm_up(self.group, pool.dk.dtype)
            providers = {"cpu": lambda: cpu_distance.distance(*arguments), **providers}
        return Operation("distance", self.row_bytes + ANCHORS * self.arena_bytes, providers)

    def _collect(self) -> Operation:
        """Eager alone on the CPU."""
        s = self.shape
        out_k, out_v = (self._random(self.tokens, s.layers, s.heads, s.head_dim) for _ in "kv")
        arguments = (self.group, self.src, self.undo, out_k, out_v)
        providers: dict[str, Run] = {"eager": lambda: reference.collect(*arguments)}
        if self.device != "cpu":
            from kvcomm_vllm.kernels import collect

            providers = {"triton": lambda: collect.collect(*arguments), **providers}
        return Operation("collect", self.row_bytes + self.arena_bytes, providers)
