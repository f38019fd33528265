# SPDX-License-Identifier: Apache-2.0
"""Distances to anchors on the CPU are those of the reference, whatever the cache and the arena."""

from __future__ import annotations

import pytest
import torch

from kvcomm_vllm.kernels import reference
from kvcomm_vllm.kernels.contract import ContractError
from kvcomm_vllm.kernels.cpu import distance as cpu_distance
from kvcomm_vllm.kernels.cpu.correct import supports
from kvcomm_vllm.kernels.cpu.load import available
from kvcomm_vllm.kernels.deviation import DistanceSums
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation

PAGES, HEADS, LAYERS, TOKENS, ROWS = 7, 3, 4, 75, 40
SHAPES = [
    (torch.bfloat16, 32, 64, 64, False),
    (torch.bfloat16, 16, 80, 32, True),
    (torch.float16, 48, 96, 96, False),
    (torch.float32, 24, 64, 0, False),
]


def make_group(
    dtype: torch.dtype, page: int, dim: int, rotary: int, inter: bool, packed: Packing = Packing.VEC
) -> PageGroup:
    generator = torch.Generator().manual_seed(dim)
    shape = (PAGES, HEADS, page, 2 * dim)
    layers = tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(LAYERS))
    return PageGroup(layers, packed, dim, rotary, inter)


def both_of(
    group: PageGroup, arena: torch.dtype, slots: torch.Tensor, anchors: int = 3
) -> tuple[DistanceSums, DistanceSums]:
    """Of the kernel and of the reference."""
    generator, dim, tokens = torch.Generator().manual_seed(5), group.head_dim, len(slots)
    angle = torch.rand(tokens, group.rotary_dim // 2, generator=generator) * 6
    turn = Rotation(angle.cos(), angle.sin())
    both = torch.randn(LAYERS, ROWS, HEADS, 2 * dim, generator=generator).to(arena)
    near_k, near_v = both.transpose(0, 1).chunk(2, dim=-1)  # as mode paper keeps them
    rows = torch.randint(-8, ROWS, (anchors, tokens), generator=generator)
    arguments = (group, slots, turn, near_k, near_v, rows)
    return cpu_distance.distance(*arguments), reference.distance(*arguments)


def assert_same(got: DistanceSums, want: DistanceSums) -> None:
    for name in ("square_v", "abs_k", "abs_v"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("arena", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("dtype", "page", "dim", "rotary", "inter"),
    SHAPES,
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_distances_are_those_of_the_reference(
    dtype: torch.dtype, page: int, dim: int, rotary: int, inter: bool, arena: torch.dtype
) -> None:
    group = make_group(dtype, page, dim, rotary, inter)
    assert supports(group) == available()
    run = torch.arange(40) + page - 7  # across pages
    scattered = torch.randperm(PAGES * page, generator=torch.Generator().manual_seed(3))
    slots = torch.cat((run, scattered[~torch.isin(scattered, run)]))[:TOKENS]
    slots[9] = -1
    assert_same(*both_of(group, arena, slots))


def test_other_packings_go_by_the_reference() -> None:
    group = make_group(torch.float32, 16, 64, 64, False, Packing.STRIDED)
    assert_same(*both_of(group, torch.float32, torch.arange(30)))


@pytest.mark.parametrize(("tokens", "anchors"), [(0, 3), (5, 0)])
def test_nothing_to_compare_is_no_distance(tokens: int, anchors: int) -> None:
    group = make_group(torch.bfloat16, 32, 64, 64, False)
    got, want = both_of(group, torch.bfloat16, torch.arange(tokens), anchors)
    assert got.abs_k.shape == (anchors, tokens)
    assert_same(got, want)


def test_rows_outside_the_arena_are_refused() -> None:
    group, near = make_group(torch.float32, 32, 64, 0, False), torch.zeros(4, LAYERS, HEADS, 64)
    none = torch.zeros(2, 0)
    with pytest.raises(ContractError, match="row 4 is outside an arena of 4 rows"):
        cpu_distance.distance(
            group, torch.arange(2), Rotation(none, none), near, near, torch.full((1, 2), 4)
        )
