# SPDX-License-Identifier: Apache-2.0
"""Caches, slots, rotations and deviations for kernel tests: odd sizes, poisoned, reproducible."""

from __future__ import annotations

import dataclasses
import itertools
import os
from dataclasses import dataclass
from typing import Any

import torch

from kvcomm_vllm.kernels.deviation import AnchorSum, Deviation, MeanMap
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation

DEVICE = "cuda" if "KVCOMM_KERNELS_ON_DEVICE" in os.environ else "cpu"
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
# Relative RMS error against the fp32 reference. The interpreter truncates to bf16 where GPUs round.
BOUNDS = {"fp32": 1e-6, "fp16": 4e-4, "bf16": 5e-3, "e4m3": 2e-3, "e5m2": 2e-3}
# (head_dim, rotary_dim, interleaved)
HEADS = (
    (64, 64, False),
    (64, 32, True),
    (80, 80, False),
    (80, 32, True),
    (96, 96, True),
    (96, 48, False),
    (128, 128, False),
    (128, 128, True),
    (128, 0, False),
    (256, 64, False),
)


@dataclass(frozen=True)
class Case:
    """One cache geometry.

    Args:
        latent: channels of V in latent pages; 0: pages are strided.
    """

    dtype: str
    head_dim: int = 64
    rotary_dim: int = 64
    interleaved: bool = False
    heads: int = 3
    page: int = 16
    layout: str = "NHD"
    layers: int = 2
    tokens: int = 37
    latent: int = 0

    @property
    def value_dim(self) -> int:
        return self.latent or self.head_dim

    @property
    def row_dim(self) -> int:
        return self.head_dim + self.value_dim

    def __str__(self) -> str:
        pairs = "gptj" if self.interleaved else "neox"
        latent = f"+{self.latent}" if self.latent else ""
        return (
            f"{self.dtype}-D{self.head_dim}{latent}-R{self.rotary_dim}-{pairs}-H{self.heads}"
            f"-page{self.page}-{self.layout}-L{self.layers}-T{self.tokens}"
        )


def matrix(dtypes: tuple[str, ...] = tuple(DTYPES), step: int = 1) -> list[Case]:
    """All dtypes times all head shapes; the other axes go round so that each value meets many."""
    others = itertools.cycle(
        zip(
            (3, 1, 8, 5, 2, 3, 1),
            (16, 48, 17, 256, 32, 128, 64),
            ("NHD", "HND", "padded", "NHD", "HND", "padded", "HND"),
            (2, 3, 1, 2, 1, 2, 3),
            (37, 1, 63, 33, 100, 17, 47),
            strict=True,
        )
    )
    cases = [Case(dtype, *head, *next(others)) for dtype, head in itertools.product(dtypes, HEADS)]
    return cases[::step]


# DeepSeek's, and others that are no powers of two, do not pair neighbours, or rotate a part.
LATENT = [
    Case("bf16", 64, 64, True, 1, 16, "NHD", 2, 37, 512),
    Case("fp16", 64, 64, True, 1, 64, "padded", 17, 5, 512),
    Case("fp32", 64, 64, False, 1, 16, "padded", 3, 9, 512),
    Case("e4m3", 64, 64, True, 1, 32, "NHD", 2, 9, 512),
    Case("e5m2", 32, 32, True, 1, 17, "NHD", 1, 33, 48),
    Case("fp32", 48, 16, True, 1, 16, "HND", 2, 21, 80),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def poisoned_group(case: Case, seed: int = 0) -> PageGroup:
    """Pages of random numbers; what lies between the pages of a padded layout is NaN."""
    rng, dim = generator(seed), case.row_dim
    pages = 2 + 2 * case.tokens // case.page
    made = []
    for _ in range(case.layers):
        shape = (pages, case.heads, case.page, dim)
        values = torch.randn(shape, generator=rng).to(DTYPES[case.dtype])
        gap = 64 if case.layout == "padded" else 0
        page = case.heads * case.page * dim + gap
        if case.layout == "HND":
            stride = (page, case.page * dim, dim, 1)
        else:
            stride = (page, dim, case.heads * dim, 1)
        itemsize = values.dtype.itemsize
        storage = torch.full((pages * page * itemsize,), 0xFF, dtype=torch.uint8, device=DEVICE)
        cache = storage.view(values.dtype).as_strided(shape, stride)
        _bytes(cache).copy_(_bytes(values))
        made.append(cache)
    fp8 = values.dtype.itemsize == 1
    scales = tuple(0.25 + 0.5 * i for i in range(case.layers))
    return PageGroup(
        tuple(made),
        Packing.LATENT if case.latent else Packing.STRIDED,
        case.head_dim,
        case.rotary_dim,
        case.interleaved,
        scales if fp8 else None,
        scales[::-1] if fp8 else None,
    )


def _bytes(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache


def copy_of(group: PageGroup) -> PageGroup:
    """The same pages in memory of their own, on the CPU, contiguous."""
    layers = tuple(_bytes(x).cpu().clone().view(x.dtype) for x in group.layers)
    return dataclasses.replace(group, layers=layers)


def slot_pairs(case: Case, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Disjoint random sources and destinations; every ninth pair has a negative slot."""
    capacity = (2 + 2 * case.tokens // case.page) * case.page
    order = torch.randperm(capacity, generator=generator(seed))
    src, dst = order[: case.tokens].clone(), order[case.tokens : 2 * case.tokens].clone()
    src[4::18], dst[13::18] = -1, -1
    return src.to(DEVICE), dst.to(DEVICE)


def rotation(case: Case, seed: int = 2) -> Rotation:
    """Random angles, and a magnitude as YaRN has one."""
    angle = torch.rand(case.tokens, case.rotary_dim // 2, generator=generator(seed)) * 6.28
    return Rotation((1.1 * angle.cos()).to(DEVICE), (1.1 * angle.sin()).to(DEVICE))


def deviation(kind: str, case: Case, seed: int = 3) -> Deviation:
    """``token`` (anchors), ``mean``, ``code`` (rank 12, one placeholder), ``mixed`` (several) or
    ``long`` (a rank of more than one block, factors in another dtype), layer 0 left out if there
    are more.
    """
    rng = generator(seed)
    skip = 1 if case.layers > 1 else 0
    shape = (case.layers - skip, case.heads)
    dims = (case.head_dim, case.value_dim)

    def random(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(size, generator=rng).to(dtype).to(DEVICE)

    if kind == "token":
        anchors, arena = 3, 150
        rows = torch.randint(-2, arena, (anchors, case.tokens), generator=rng).to(DEVICE)
        both = random(shape[0], arena, case.heads, case.row_dim, dtype=torch.bfloat16)
        dk, dv = both.transpose(0, 1).split(dims, dim=-1)  # as mode paper keeps them
        wk, wv = random(2, anchors, case.tokens)
        return AnchorSum(dk, dv, rows, wk, wv, skip)
    arena, entries = 40, 3
    mean_k, mean_v = (random(arena, *shape, dim, dtype=torch.float16) for dim in dims)
    row = torch.randint(0, arena, (case.tokens,), generator=rng).to(DEVICE)
    if kind == "mean":
        return MeanMap(mean_k, mean_v, row, skip_layers=skip)
    rank = 72 if kind == "long" else 12
    # Numbers of 8 bits, whose products are exact in any dtype that a device multiplies in.
    code = random(case.tokens, shape[0], rank, dtype=torch.bfloat16).float()
    up = random(entries, *shape, rank, case.row_dim, dtype=torch.bfloat16) / 4
    up = up.half() if kind == "long" else up.float()
    if kind == "mixed":  # in no order, some without a code
        entry = torch.randint(-1, entries, (case.tokens,), generator=rng)
    else:
        entry = torch.full((case.tokens,), entries - 2)
    return MeanMap(mean_k, mean_v, row, code, up, entry.int().to(DEVICE), skip)


def on_cpu(value: Any) -> Any:
    """A rotation or deviation with its tensors on the CPU, for the reference."""
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    moved = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    return dataclasses.replace(value, **moved)


def rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative RMS error; NaN anywhere gives NaN, which no bound admits."""
    got, want = got.cpu().float(), want.cpu().float()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def slot_rows(group: PageGroup, layer: int) -> torch.Tensor:
    """Raw cache rows by slot: ``[slots, heads, row_dim]``, fp8 as bytes."""
    return _bytes(group.layers[layer]).transpose(1, 2).flatten(0, 1).cpu()


def assert_same_cache(
    got: PageGroup, want: PageGroup, before: PageGroup, written: torch.Tensor, bound: float
) -> None:
    """Written slots agree within the bound, layer by layer; all others keep their bytes."""
    written = written[written >= 0].cpu()
    for layer in range(len(got.layers)):
        a, b, old = (slot_rows(group, layer) for group in (got, want, before))
        others = torch.ones(len(a), dtype=torch.bool)
        others[written] = False
        assert torch.equal(a[others], old[others]), f"layer {layer}: an untouched slot changed"
        dtype = got.layers[layer].dtype
        if len(written):
            error = rms_error(a[written].view(dtype), b[written].view(dtype))
            assert error <= bound, f"layer {layer}: relative RMS error {error:.2e} > {bound:.0e}"
