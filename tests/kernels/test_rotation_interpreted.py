# SPDX-License-Identifier: Apache-2.0
"""Laws that loading and rotating obey, for any angles, positions and pages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_caches import DEVICE, Case, copy_of, deviation, poisoned_group, rms_error, slot_rows

from kvcomm_vllm.kernels import blocks, correct, load
from kvcomm_vllm.kernels.pages import PageGroup, Rotation

TOKENS = 6
EXAMPLES = settings(max_examples=8, deadline=None, derandomize=True)
# The last one of latent pages, with a V of 80.
PAIRS = st.sampled_from(
    [(64, 64, False, 0), (80, 48, True, 0), (64, 24, False, 0), (32, 32, True, 80)]
)
SHIFTS = st.integers(-40_000, 40_000)
SEEDS = st.integers(0, 1000)
SLOTS = torch.arange(TOKENS, device=DEVICE) * 3


def case_of(pairs: tuple[int, int, bool, int]) -> Case:
    *head, latent = pairs
    heads = 1 if latent else 2
    return Case("fp32", *head, heads=heads, layers=2, tokens=TOKENS, latent=latent)


def by(positions: int, case: Case) -> Rotation:
    """The rotation over a number of positions, as a model with theta 10,000 has it (fp64
    angles).
    """
    half = case.rotary_dim // 2
    frequency = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = (positions * frequency).expand(TOKENS, half)
    return Rotation(angle.cos().float().to(DEVICE), angle.sin().float().to(DEVICE))


def rows(group: PageGroup) -> torch.Tensor:
    return torch.cat([slot_rows(group, layer) for layer in range(len(group.layers))])


@EXAMPLES
@given(PAIRS, SHIFTS, SEEDS)
def test_rotating_there_and_back_changes_nothing(
    pairs: tuple[int, int, bool, int], shift: int, seed: int
) -> None:
    case = case_of(pairs)
    group = poisoned_group(case, seed)
    before = rows(copy_of(group))
    load.load(group, SLOTS, SLOTS, by(shift, case))
    load.load(group, SLOTS, SLOTS, by(-shift, case))
    assert rms_error(rows(group), before) <= 1e-6


@EXAMPLES
@given(PAIRS, SHIFTS, SHIFTS, SEEDS)
def test_two_shifts_are_one_shift_by_their_sum(
    pairs: tuple[int, int, bool, int], first: int, second: int, seed: int
) -> None:
    case = case_of(pairs)
    twice, once = poisoned_group(case, seed), poisoned_group(case, seed)
    load.load(twice, SLOTS, SLOTS, by(first, case))
    load.load(twice, SLOTS, SLOTS, by(second, case))
    load.load(once, SLOTS, SLOTS, by(first + second, case))
    assert rms_error(rows(twice), rows(once)) <= 1e-6


@EXAMPLES
@given(PAIRS, SHIFTS, SEEDS)
def test_it_does_not_matter_which_pages_hold_the_tokens(
    pairs: tuple[int, int, bool, int], shift: int, seed: int
) -> None:
    case = case_of(pairs)
    group, shuffled = poisoned_group(case, seed), poisoned_group(case, seed)
    pages = len(group.layers[0])
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
    for layer in shuffled.layers:
        layer.copy_(layer[order].clone())
    place = order.argsort().to(DEVICE)
    moved = place[SLOTS // case.page] * case.page + SLOTS % case.page
    load.load(group, SLOTS, SLOTS, by(shift, case))
    load.load(shuffled, moved, moved, by(shift, case))
    for layer, other in zip(group.layers, shuffled.layers, strict=True):
        assert torch.equal(layer[order].cpu(), other.cpu())


@EXAMPLES
@given(PAIRS, st.sampled_from(["token", "mean", "code"]), SHIFTS, SHIFTS)
def test_zero_deviation_is_rotation_alone(
    pairs: tuple[int, int, bool, int], kind: str, old: int, new: int
) -> None:
    case = case_of(pairs)
    corrected, plain = poisoned_group(case), poisoned_group(case)
    undo, redo = by(-old, case), by(new, case)
    change = deviation(kind, case)
    zeros = {
        name: torch.zeros_like(value)
        for name in ("dk", "dv", "mean_k", "mean_v", "code")
        if (value := getattr(change, name, None)) is not None
    }
    zero = dataclasses.replace(change, **zeros)
    correct.load_corrected(corrected, SLOTS, SLOTS + 1, undo, redo, zero)
    load.load(plain, SLOTS, SLOTS + 1, undo.then(redo))
    assert rms_error(rows(corrected), rows(plain)) <= 1e-6


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float8_e4m3fn, 4), (torch.float8_e5m2, 5)], ids=["e4m3", "e5m2"]
)
def test_fp8_codes_are_read_exactly_and_written_to_nearest_even(
    dtype: torch.dtype, kind: int
) -> None:
    """All 256 codes, and values between, on and far beyond them; oracle: torch's own conversion."""
    import triton
    import triton.language as tl

    @triton.jit
    def convert(p_code, p_value, p_decoded, p_encoded, KIND: tl.constexpr):
        o = tl.arange(0, 2048)
        tl.store(p_decoded + o, blocks.decode(tl.load(p_code + o), KIND))
        tl.store(p_encoded + o, blocks.encode(tl.load(p_value + o), tl.uint8, KIND))

    codes = (torch.arange(2048) % 256).to(torch.uint8)
    exact = codes[:256].view(dtype).float()
    limit = torch.finfo(dtype).max
    finite = exact[exact.isfinite()].unique()
    ties = (finite[1:] + finite[:-1]) / 2
    far = torch.tensor([limit * 3, -limit * 3, float("inf"), -float("inf"), float("nan"), 0.0])
    noise = torch.randn(2048, generator=torch.Generator().manual_seed(0))
    values = torch.cat((ties, ties.nextafter(far[:1]), finite, far, noise * 3, noise * 1e-3))[:2048]
    decoded, encoded = torch.zeros(2048, device=DEVICE), torch.zeros(2048, device=DEVICE).byte()
    convert[(1,)](codes.to(DEVICE), values.to(DEVICE), decoded, encoded, kind)
    assert torch.equal(decoded[:256].cpu().nan_to_num(7e7), exact.nan_to_num(7e7))
    want = values.clamp(-limit, limit).to(dtype).float()
    got = encoded.cpu().view(dtype).float()
    assert torch.equal(got.nan_to_num(7e7), want.nan_to_num(7e7))
