# SPDX-License-Identifier: Apache-2.0
"""The CPU load paths (compiled and portable) do what the reference says, slot by slot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm_vllm.kernels import packing, reference
from kvcomm_vllm.kernels.contract import ContractError
from kvcomm_vllm.kernels.cpu import load as cpu_load
from kvcomm_vllm.kernels.cpu import portable
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation

Load = Callable[[PageGroup, torch.Tensor, torch.Tensor, Rotation], None]
LOADS = pytest.mark.parametrize(
    "load", [cpu_load.load, portable.load], ids=["compiled", "portable"]
)
PAGES, LATENT_DIM = 9, 112
# Largest error of one rounding, relative to the largest value of the layer's K.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}


def make_group(
    packing: Packing, dtype: torch.dtype, page: int, dim: int, rotary: int, interleaved: bool
) -> PageGroup:
    generator = torch.Generator().manual_seed(page * dim + rotary)
    latent = packing is Packing.LATENT
    shape = (PAGES, 1, page, dim + LATENT_DIM) if latent else (PAGES, 3, page, 2 * dim)
    layers = tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    return PageGroup(layers, packing, dim, rotary, interleaved)


def twin(group: PageGroup) -> PageGroup:
    return dataclasses.replace(group, layers=tuple(layer.clone() for layer in group.layers))


def read(group: PageGroup, slots: torch.Tensor) -> torch.Tensor:
    """K as stored, and V behind it, at the slots: fp32 ``[layers, tokens, heads, row_dim]``."""
    layers = range(len(group.layers))
    return torch.stack([torch.cat(packing.read(group, layer, slots), dim=-1) for layer in layers])


def make_turn(tokens: int, rotary: int, seed: int = 0) -> Rotation:
    angle = torch.rand(tokens, rotary // 2, generator=torch.Generator().manual_seed(seed)) * 6
    return Rotation(1.1 * angle.cos(), 1.1 * angle.sin())


def shifted_slots(page: int, src_at: int, dst_at: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """A span that starts anywhere in scattered pages and lands at another alignment."""
    pages = torch.tensor([7, 0, 4, 2, 8, 1, 3, 6])
    table = pages[:, None] * page + torch.arange(page)
    return table[:4].flatten()[src_at:][:tokens], table[4:].flatten()[dst_at:][:tokens]


def assert_same(actual: PageGroup, expected: PageGroup) -> None:
    dtype = actual.layers[0].dtype
    for got, want in zip(actual.layers, expected.layers, strict=True):
        bound = ROUNDING[dtype] * want.float().abs().max()
        assert torch.isfinite(got).all()
        assert (got.float() - want.float()).abs().max() <= bound


CASES = [
    (Packing.VEC, torch.bfloat16, 32, 64, 64, False),
    (Packing.VEC, torch.bfloat16, 128, 64, 64, True),
    (Packing.VEC, torch.bfloat16, 16, 80, 32, False),
    (Packing.VEC, torch.bfloat16, 24, 96, 96, False),
    (Packing.VEC, torch.float16, 48, 80, 20, True),
    (Packing.VEC, torch.float16, 32, 128, 0, False),
    (Packing.VEC, torch.float32, 32, 64, 36, False),
    (Packing.VEC, torch.float32, 40, 64, 64, True),
    (Packing.AMX, torch.bfloat16, 32, 64, 64, False),
    (Packing.AMX, torch.bfloat16, 32, 96, 96, True),
    (Packing.AMX, torch.bfloat16, 64, 128, 32, False),
    (Packing.AMX, torch.bfloat16, 32, 64, 22, True),
    (Packing.AMX, torch.bfloat16, 32, 64, 0, False),
    (Packing.AMX, torch.bfloat16, 32, 64, 22, False),
    (Packing.STRIDED, torch.bfloat16, 16, 64, 64, False),
    (Packing.LATENT, torch.float32, 16, 64, 64, True),
    (Packing.LATENT, torch.bfloat16, 32, 64, 64, True),
    (Packing.LATENT, torch.float16, 16, 32, 16, False),
]


def case_id(value: object) -> str:
    return value.value if isinstance(value, Packing) else str(value).removeprefix("torch.")


@LOADS
@pytest.mark.parametrize(
    ("packing", "dtype", "page", "dim", "rotary", "interleaved"), CASES, ids=case_id
)
def test_load_matches_reference_at_any_alignment(
    load: Load,
    packing: Packing,
    dtype: torch.dtype,
    page: int,
    dim: int,
    rotary: int,
    interleaved: bool,
) -> None:
    group = make_group(packing, dtype, page, dim, rotary, interleaved)
    expected = twin(group)
    for src_at, dst_at in ((0, 0), (5, 0), (3, 7), (page - 1, 1)):
        src, dst = shifted_slots(page, src_at, dst_at, 3 * page - 3)
        turn = make_turn(len(src), rotary, src_at)
        load(group, src, dst, turn)
        reference.load(expected, src, dst, turn)
        assert_same(group, expected)


@pytest.mark.parametrize(
    "packing", [Packing.VEC, Packing.AMX, Packing.LATENT], ids=lambda p: p.value
)
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
@LOADS
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_set_of_slots_moves_and_nothing_else_changes(
    load: Load, interleaved: bool, packing: Packing, data: st.DataObject
) -> None:
    group = make_group(packing, torch.bfloat16, 32, 32, 32, interleaved)
    slots = data.draw(st.permutations(range(PAGES * 32)))
    tokens = data.draw(st.integers(0, 140))
    src, dst = (
        torch.tensor(slots[:tokens], dtype=torch.int64),
        torch.tensor(slots[tokens:])[:tokens],
    )
    order = data.draw(st.booleans())
    if order:  # long runs with breaks instead of single tokens
        src, dst = src.sort().values, dst.sort().values
    skipped = data.draw(st.lists(st.integers(0, max(tokens - 1, 0)), max_size=5))
    if tokens and skipped:
        src[skipped[0]], dst[skipped] = -1, -1
    expected = twin(group)
    turn = make_turn(tokens, 32)
    load(group, src, dst, turn)
    reference.load(expected, src, dst, turn)
    assert_same(group, expected)
    untouched = torch.ones(PAGES * 32, dtype=torch.bool)
    untouched[dst[(src >= 0) & (dst >= 0)]] = False
    still = untouched.nonzero().flatten()
    before = make_group(packing, torch.bfloat16, 32, 32, 32, interleaved)
    assert torch.equal(read(group, still), read(before, still))


@LOADS
@pytest.mark.parametrize(
    "packing", [Packing.VEC, Packing.AMX, Packing.LATENT], ids=lambda p: p.value
)
def test_values_arrive_bit_for_bit(load: Load, packing: Packing) -> None:
    """V is copied, never converted: infinities, NaN payloads and negative zeros included."""
    group = make_group(packing, torch.bfloat16, 32, 64, 0, False)
    for layer in group.layers:
        layer.view(torch.int16).random_(-(2**15), 2**15, generator=torch.Generator().manual_seed(1))
    bits = dataclasses.replace(
        group, layers=tuple(layer.view(torch.int16) for layer in group.layers)
    )
    src, dst = shifted_slots(32, 5, 2, 80)
    load(group, src, dst, Rotation(torch.empty(80, 0), torch.empty(80, 0)))
    for layer in range(len(group.layers)):
        value = packing_values(bits, layer)
        assert torch.equal(value(src), value(dst))


def packing_values(group: PageGroup, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
    from kvcomm_vllm.kernels.packing import views

    view, page = views(group, layer)[1], group.tokens_per_page
    if group.packing in (Packing.VEC, Packing.LATENT):
        return lambda slots: view[slots // page, :, slots % page]
    return lambda slots: view[slots // page, :, :, slots % page // 2, :, slots % 2]


@LOADS
def test_turning_there_and_back_returns_the_key(load: Load) -> None:
    group = make_group(Packing.VEC, torch.float32, 32, 64, 64, False)
    src, dst = shifted_slots(32, 9, 4, 70)
    angle = torch.rand(70, 32) * 6
    before = read(group, src)
    load(group, src, dst, Rotation(angle.cos(), angle.sin()))
    load(group, dst, src, Rotation(angle.cos(), -angle.sin()))
    torch.testing.assert_close(read(group, src), before, atol=1e-5, rtol=0)


@LOADS
def test_a_token_may_be_turned_in_place(load: Load) -> None:
    group = make_group(Packing.VEC, torch.bfloat16, 32, 64, 64, False)
    expected = twin(group)
    slots = torch.arange(3, 90)
    load(group, slots, slots, make_turn(87, 64))
    reference.load(expected, slots, slots, make_turn(87, 64))
    assert_same(group, expected)


@LOADS
@pytest.mark.parametrize(
    ("src", "dst", "words"),
    [
        ([0, 1, 2], [2, 40, 41], "another token's destination"),
        ([0, 1, 2], [40, 40, 41], "occurs twice"),
        ([0, 1, 2], [40, 41, PAGES * 32], "outside a cache"),
        ([0, 1], [40, 41, 42], "source slots for"),
    ],
    ids=["overlap", "duplicate", "out-of-range", "lengths"],
)
def test_an_undefined_move_is_refused_untouched(
    load: Load, src: list[int], dst: list[int], words: str
) -> None:
    group = make_group(Packing.VEC, torch.bfloat16, 32, 64, 64, False)
    before = twin(group)
    with pytest.raises(ContractError, match=words):
        load(group, torch.tensor(src), torch.tensor(dst), make_turn(len(src), 64))
    for now, then in zip(group.layers, before.layers, strict=True):
        assert torch.equal(now, then)


def test_rounding_is_to_nearest_even() -> None:
    """With sin = 0 the kernel multiplies by cos: compare with torch's own conversion."""
    group = make_group(Packing.VEC, torch.bfloat16, 32, 64, 64, False)
    src, dst = shifted_slots(32, 0, 0, 96)
    cos = 1 + torch.rand(96, 32)
    key = read(group, src)[..., :64]
    cpu_load.load(group, src, dst, Rotation(cos, torch.zeros(96, 32)))
    want = (key * torch.cat((cos, cos), dim=1)[None, :, None]).bfloat16().float()
    assert torch.equal(read(group, dst)[..., :64], want)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            group = make_group(Packing.VEC, torch.float32, 128, 128, 64, False)
            src, dst = shifted_slots(128, 5, 2, 500)
            cpu_load.load(group, src, dst, make_turn(500, 64))
            results.append(group)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0].layers, other.layers, strict=True))


def test_what_this_machine_serves_is_compiled() -> None:
    """The parametrised tests above would be vacuous if everything went the portable way."""
    pytest.importorskip("numba")
    packed = [case for case in CASES if case[0] in (Packing.VEC, Packing.AMX)]
    supported = [case for case in CASES if cpu_load.supports(make_group(*case))]
    assert len(supported) == len(packed) - 1  # all but odd AMX pairs
