# SPDX-License-Identifier: Apache-2.0
"""Triton kernels compute what the reference computes, on every layout, dtype and head shape."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_caches import (
    BOUNDS,
    DEVICE,
    DTYPES,
    LATENT,
    Case,
    assert_same_cache,
    copy_of,
    deviation,
    generator,
    matrix,
    on_cpu,
    poisoned_group,
    rms_error,
    rotation,
    slot_pairs,
)

from kvcomm_vllm.kernels import codes, collect, correct, distance, load, reference, turns
from kvcomm_vllm.kernels.deviation import CodeMaps, MeanMap
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation

KINDS = ("token", "mean", "code", "mixed", "long")
CORRECTED = [
    (kind, case)
    for i, kind in enumerate(KINDS)
    for case in (*matrix(step=len(KINDS))[i % 2 :], *LATENT[i % 2 :: 2])
]


def written_by(src: torch.Tensor, dst: torch.Tensor) -> torch.Tensor:
    return dst[src >= 0]


@pytest.mark.parametrize("case", matrix() + LATENT, ids=str)
def test_load_agrees_with_reference(case: Case) -> None:
    group, (src, dst), turn = poisoned_group(case), slot_pairs(case), rotation(case)
    before, want = copy_of(group), copy_of(group)
    load.load(group, src, dst, turn)
    reference.load(want, src.cpu(), dst.cpu(), on_cpu(turn))
    assert_same_cache(group, want, before, written_by(src, dst), BOUNDS[case.dtype])


@pytest.mark.parametrize(("kind", "case"), CORRECTED, ids=lambda x: str(x))
def test_load_corrected_agrees_with_reference(kind: str, case: Case) -> None:
    group, (src, dst) = poisoned_group(case), slot_pairs(case)
    undo, redo, change = rotation(case), rotation(case, seed=5), deviation(kind, case)
    before, want = copy_of(group), copy_of(group)
    correct.load_corrected(group, src, dst, undo, redo, change)
    reference.load_corrected(want, src.cpu(), dst.cpu(), on_cpu(undo), on_cpu(redo), on_cpu(change))
    assert_same_cache(group, want, before, written_by(src, dst), BOUNDS[case.dtype])


@pytest.mark.parametrize("case", matrix(step=2) + LATENT, ids=str)
def test_collect_agrees_with_reference(case: Case) -> None:
    group, (slots, _), undo = poisoned_group(case), slot_pairs(case), rotation(case)
    shape, dims = (case.tokens, case.layers, case.heads), (case.head_dim, case.value_dim)
    outs = [torch.full((*shape, dim), 123.0, device=DEVICE) for dim in dims]
    wanted = [out.cpu().clone() for out in outs]
    collect.collect(group, slots, undo, outs[0], outs[1])
    reference.collect(copy_of(group), slots.cpu(), on_cpu(undo), wanted[0], wanted[1])
    for got, want in zip(outs, wanted, strict=True):
        assert rms_error(got, want) <= 1e-6
        assert bool((got[slots < 0] == 123.0).all()), "the row of a skipped token was written"


@pytest.mark.parametrize("case", [c for c in matrix(step=4) if c.tokens < 60] + LATENT, ids=str)
def test_distance_agrees_with_reference(case: Case) -> None:
    group, (slots, _), undo = poisoned_group(case), slot_pairs(case), rotation(case)
    rng, arena = generator(9), 90
    shape = (case.layers, arena, case.heads, case.row_dim)
    both = torch.randn(shape, generator=rng).half().to(DEVICE).transpose(0, 1)
    anchor_k, anchor_v = group.split(both)  # as mode paper keeps them
    rows = torch.randint(-1, arena, (3, case.tokens), generator=rng).to(DEVICE)
    got = distance.distance(group, slots, undo, anchor_k, anchor_v, rows)
    want = reference.distance(
        copy_of(group),
        slots.cpu(),
        on_cpu(undo),
        anchor_k.cpu(),
        anchor_v.cpu(),
        rows.cpu(),
    )
    assert rms_error(got.square_v, want.square_v) <= 1e-5
    assert rms_error(got.abs_k, want.abs_k) <= 1e-5
    assert rms_error(got.abs_v, want.abs_v) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_may_be_turned_where_they_are(dtype: str) -> None:
    case = Case(dtype)
    group, (slots, _), turn = poisoned_group(case), slot_pairs(case), rotation(case)
    before, want = copy_of(group), copy_of(group)
    load.load(group, slots, slots, turn)
    reference.load(want, slots.cpu(), slots.cpu(), on_cpu(turn))
    assert_same_cache(group, want, before, slots, BOUNDS[dtype])


def test_addresses_reach_beyond_32_bits() -> None:
    """Two pages 2^31 bytes apart; memory in between is reserved but never touched."""
    page, far = 16, 2**31
    storage = torch.empty(far + page * 64, dtype=torch.uint8, device=DEVICE)
    layer = storage.view(torch.float8_e5m2).as_strided((2, 1, page, 64), (far, 64, 64, 1))
    layer[0].view(torch.uint8).copy_(torch.arange(page * 64).reshape(1, page, 64) % 120)
    layer[1].view(torch.uint8).zero_()
    group = PageGroup((layer,), Packing.STRIDED, 32, 0)
    empty = torch.zeros(page, 0, device=DEVICE)
    slots = torch.arange(page, device=DEVICE)
    load.load(group, slots, slots + page, Rotation(empty, empty))
    assert torch.equal(layer[1].view(torch.uint8), layer[0].view(torch.uint8))


@pytest.mark.parametrize("kind", ["mean", "code"])
def test_layers_that_are_all_left_out_are_only_turned(kind: str) -> None:
    case = Case("fp32")
    group, (src, dst), undo, redo = (
        poisoned_group(case),
        slot_pairs(case),
        rotation(case),
        rotation(case, seed=5),
    )
    change = deviation(kind, case)
    assert isinstance(change, MeanMap)
    empty = {"mean_k": change.mean_k[:, :0], "mean_v": change.mean_v[:, :0]}
    if change.code is not None and change.up is not None:
        empty |= {"code": change.code[:, :0], "up": change.up[:, :0]}
    none = dataclasses.replace(change, **empty, skip_layers=case.layers)
    before, want = copy_of(group), copy_of(group)
    correct.load_corrected(group, src, dst, undo, redo, none)
    reference.load_corrected(want, src.cpu(), dst.cpu(), on_cpu(undo), on_cpu(redo), on_cpu(none))
    assert_same_cache(group, want, before, written_by(src, dst), BOUNDS["fp32"])


def picked(change: MeanMap, tokens: torch.Tensor) -> MeanMap:
    """The correction of some of its tokens alone."""
    assert change.code is not None
    assert change.entry is not None
    parts = {"row": change.row, "code": change.code, "entry": change.entry}
    return dataclasses.replace(change, **{name: part[tokens] for name, part in parts.items()})


@pytest.mark.parametrize("case", matrix(("fp32", "bf16"), step=3), ids=str)
def test_placeholders_in_one_call_are_corrected_as_in_calls_of_their_own(case: Case) -> None:
    group, (src, dst) = poisoned_group(case), slot_pairs(case)
    undo, redo, change = rotation(case), rotation(case, seed=5), deviation("mixed", case)
    assert isinstance(change, MeanMap)
    assert change.entry is not None
    before, apart = copy_of(group), poisoned_group(case)
    correct.load_corrected(group, src, dst, undo, redo, change)
    for entry in change.entry.unique():
        mine = (change.entry == entry).nonzero().flatten()
        turns = [Rotation(turn.cos[mine], turn.sin[mine]) for turn in (undo, redo)]
        correct.load_corrected(apart, src[mine], dst[mine], *turns, picked(change, mine))
    assert_same_cache(group, copy_of(apart), before, written_by(src, dst), BOUNDS["fp32"])


# The interpreter multiplies the bits of bf16 as if they were integers.
@pytest.mark.parametrize("dtype", ["fp32", "fp16", *(["bf16"] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize("tokens", [1, 37, 130])
def test_codes_agree_with_reference(tokens: int, dtype: str) -> None:
    """Of tokens of three placeholders in no order, and of none; features that are folded."""
    rng, entries, raw_width, inputs, layers, rank = generator(4), 3, 100, 36, 2, 12

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=rng).to(DEVICE)

    decays = torch.tensor([8.0, 512.0], device=DEVICE)
    down = random(entries, inputs + 2, layers, rank).to(DTYPES[dtype])
    maps = CodeMaps(random(entries, raw_width), random(entries, inputs), decays, down)
    index = torch.randint(0, 2000, (tokens,), generator=rng).int().to(DEVICE)
    entry = torch.randint(-1, entries, (tokens,), generator=rng).int().to(DEVICE)
    raw = random(tokens, raw_width)
    got = codes.codes(raw, maps, index, entry)
    want = reference.codes(raw.cpu(), on_cpu(maps), index.cpu(), entry.cpu())
    assert got.dtype is want.dtype is DTYPES[dtype]
    assert rms_error(got, want) <= {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}[dtype]
    assert not got[entry < 0].any()


@pytest.mark.parametrize("half", [0, 5, 64])
def test_turns_out_of_a_rotary_table_are_its_quotients(half: int) -> None:
    positions, tokens = 3000, 70
    angle = torch.rand(positions, half, generator=generator(6)) * 6.28
    cos, sin = (1.2 * angle.cos()).to(DEVICE), (1.2 * angle.sin()).to(DEVICE)
    old, new = torch.randint(0, positions, (2, tokens), generator=generator(7)).to(DEVICE)
    square = cos.square() + sin.square()
    undo = Rotation((cos / square)[old], (-sin / square)[old])
    redo = Rotation(cos[new], sin[new])
    apart, joined = turns.apart(cos, sin, old, new), turns.move(cos, sin, old, new)
    for got, want in zip((*apart, joined), (undo, redo, undo.then(redo)), strict=True):
        torch.testing.assert_close(got.cos, want.cos)
        torch.testing.assert_close(got.sin, want.sin)


def test_no_tokens_and_only_skipped_tokens_change_nothing() -> None:
    case = Case("bf16", tokens=5)
    group, before = poisoned_group(case), copy_of(poisoned_group(case))
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    empty = torch.zeros(0, 32, device=DEVICE)
    load.load(group, none, none, Rotation(empty, empty))
    skipped = torch.full((5,), -1, device=DEVICE)
    load.load(group, skipped, skipped, rotation(case))
    correct.load_corrected(
        group, skipped, skipped, rotation(case), rotation(case), deviation("code", case)
    )
    assert_same_cache(group, before, before, none, 0.0)
