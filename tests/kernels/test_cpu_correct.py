# SPDX-License-Identifier: Apache-2.0
"""The corrected load on the CPU adds the deviation that the reference adds, and rounds once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm_vllm.kernels import packing, reference
from kvcomm_vllm.kernels.cpu import correct as cpu_correct
from kvcomm_vllm.kernels.cpu import load as cpu_load
from kvcomm_vllm.kernels.deviation import AnchorSum, Deviation, MeanMap
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation

PAGES, HEADS, LAYERS, TOKENS = 9, 3, 4, 75
DEVIATIONS = ["mean", "mean-bf16", "anchors", "anchors-bf16"]
DEVIATIONS += ["code-16", "code-5", "code-32-fp16", "code-20-bf16", "code-16-mixed"]
SHAPES = [
    (torch.bfloat16, 32, 64, 64, False),
    (torch.bfloat16, 16, 80, 32, True),
    (torch.float16, 48, 96, 96, False),
    (torch.float32, 24, 64, 0, False),
]
# RMS of the error relative to the RMS of the result: one rounding of the cache's dtype, and for
# a code in bf16 its rounding and its factor's besides (of a quarter of the result here).
CODE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ONE_ROUNDING = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-6}


def make_group(dtype: torch.dtype, page: int, dim: int, rotary: int, inter: bool) -> PageGroup:
    generator = torch.Generator().manual_seed(dim)
    shape = (PAGES, HEADS, page, 2 * dim)
    layers = tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(LAYERS))
    return PageGroup(layers, Packing.VEC, dim, rotary, inter)


def make_slots(page: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(PAGES * page, generator=torch.Generator().manual_seed(3))
    scattered = order[: 2 * 20].reshape(2, 20)
    taken = set(order[: 2 * 20].tolist())
    free = torch.tensor([slot for slot in range(PAGES * page) if slot not in taken])
    half = len(free) // 2
    count = min(TOKENS - 20, half)
    src = torch.cat((free[:count], scattered[0]))
    dst = torch.cat((free[half : half + count], scattered[1]))
    src[5], dst[9] = -1, -2
    return src, dst


def make_rotation(tokens: int, rotary: int, seed: int) -> Rotation:
    angle = torch.rand(tokens, rotary // 2, generator=torch.Generator().manual_seed(seed)) * 6
    return Rotation(angle.cos(), angle.sin())


def make_deviation(kind: str, dim: int, tokens: int, skip: int) -> Deviation:
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    layers, length = LAYERS - skip, 12
    if kind.startswith("anchors"):
        dk, dv = random(40, layers, HEADS, dim), random(40, layers, HEADS, dim)
        if kind == "anchors-bf16":
            both = torch.cat((dk, dv), dim=-1).bfloat16().transpose(0, 1).contiguous()
            dk, dv = both.transpose(0, 1).chunk(2, dim=-1)  # as mode paper keeps them
        rows = torch.randint(-8, 40, (5, tokens), generator=generator)
        return AnchorSum(dk, dv, rows, random(5, tokens) / 5, random(5, tokens) / 5, skip)
    mean_k, mean_v = (0.2 * random(30, layers, HEADS, dim) for _ in range(2))
    row = (torch.arange(tokens) + 3).clamp(max=length)
    if kind == "mean":
        return MeanMap(mean_k, mean_v, row, skip_layers=skip)
    if kind == "mean-bf16":
        return MeanMap(mean_k.bfloat16(), mean_v.bfloat16(), row, skip_layers=skip)
    _, rank, *dtype = kind.removesuffix("-mixed").split("-")
    stored = CODE_DTYPES[dtype[0] if dtype else "fp32"]
    code = random(tokens, layers, int(rank)).to(stored)
    up = 0.25 / int(rank) ** 0.5 * random(3, layers, HEADS, int(rank), 2 * dim)
    entry = torch.ones(tokens)
    if kind.endswith("mixed"):
        entry = torch.randint(-1, 3, (tokens,), generator=generator)
    return MeanMap(mean_k, mean_v, row, code, up.to(stored), entry.int(), skip)


def error(actual: PageGroup, expected: PageGroup, layer: int) -> float:
    got, want = actual.layers[layer].float(), expected.layers[layer].float()
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("skip", [0, 1], ids=["all-layers", "layer-0-exact"])
@pytest.mark.parametrize("kind", DEVIATIONS)
@pytest.mark.parametrize(
    ("dtype", "page", "dim", "rotary", "inter"),
    SHAPES,
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_corrected_load_matches_reference(
    dtype: torch.dtype, page: int, dim: int, rotary: int, inter: bool, kind: str, skip: int
) -> None:
    group = make_group(dtype, page, dim, rotary, inter)
    assert cpu_correct.supports(group) == cpu_load.available()
    expected = dataclasses.replace(group, layers=tuple(layer.clone() for layer in group.layers))
    src, dst = make_slots(page)
    undo, redo = (make_rotation(len(src), rotary, seed) for seed in (1, 2))
    deviation = make_deviation(kind, dim, len(src), skip)
    cpu_correct.load_corrected(group, src, dst, undo, redo, deviation)
    reference.load_corrected(expected, src, dst, undo, redo, deviation)
    for layer in range(LAYERS):
        assert error(group, expected, layer) < ONE_ROUNDING[dtype]


def run_both(group: PageGroup, kind: str, src: torch.Tensor, dst: torch.Tensor) -> list[float]:
    """Errors by layer of the compiled kernel against the reference."""
    expected = dataclasses.replace(group, layers=tuple(layer.clone() for layer in group.layers))
    undo, redo = (make_rotation(len(src), group.rotary_dim, seed) for seed in (1, 2))
    deviation = make_deviation(kind, group.head_dim, len(src), 1)
    cpu_correct.load_corrected(group, src, dst, undo, redo, deviation)
    reference.load_corrected(expected, src, dst, undo, redo, deviation)
    return [error(group, expected, layer) for layer in range(LAYERS)]


def test_a_rank_beyond_one_vector_is_served() -> None:
    group = make_group(torch.float32, 32, 64, 64, False)
    errors = run_both(group, "code-20", *make_slots(32))
    assert max(errors) < ONE_ROUNDING[torch.float32]


def test_tokens_may_be_corrected_where_they_are() -> None:
    group = make_group(torch.bfloat16, 32, 64, 64, False)
    slots = torch.arange(7, 7 + 100)
    assert max(run_both(group, "code-16", slots, slots)) < ONE_ROUNDING[torch.bfloat16]


def test_every_token_of_a_page_in_pieces_gets_its_own_code() -> None:
    group = make_group(torch.bfloat16, 32, 64, 64, False)
    dst = torch.arange(3 * 32, 5 * 32, 2)  # pieces of one token, 16 of them a page
    src = torch.arange(32, 64).flip(0)
    assert max(run_both(group, "code-16", src, dst)) < ONE_ROUNDING[torch.bfloat16]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    entries=st.lists(st.integers(-1, 2), min_size=5, max_size=5),
    start=st.integers(0, 40),
)
def test_placeholders_in_one_call_are_corrected_as_in_calls_of_their_own(
    lengths: list[int], entries: list[int], start: int
) -> None:
    """Spans of any placeholders behind each other, and so in one page."""
    group, apart = (make_group(torch.bfloat16, 32, 64, 64, False) for _ in range(2))
    entry = torch.cat([torch.full((n,), e) for n, e in zip(lengths, entries, strict=False)]).int()
    tokens = min(len(entry), 9 * 32 // 2 - 40)
    entry, src = entry[:tokens], torch.arange(tokens)
    dst = 9 * 32 - tokens - start + src
    undo, redo = (make_rotation(tokens, 64, seed) for seed in (1, 2))
    change = make_deviation("code-16", 64, tokens, 1)
    assert isinstance(change, MeanMap)
    assert change.code is not None
    change = dataclasses.replace(change, entry=entry)
    cpu_correct.load_corrected(group, src, dst, undo, redo, change)
    for number in entry.unique():
        mine = (entry == number).nonzero().flatten()
        turns = [Rotation(turn.cos[mine], turn.sin[mine]) for turn in (undo, redo)]
        own = {"row": change.row[mine], "code": change.code[mine], "entry": entry[mine]}
        part = dataclasses.replace(change, **own)
        cpu_correct.load_corrected(apart, src[mine], dst[mine], *turns, part)
    for one, other in zip(group.layers, apart.layers, strict=True):
        assert torch.equal(one, other)


def test_a_cpu_without_bf16_products_multiplies_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu_load.available():
        pytest.skip("numba cannot compile kernels on this machine")
    from kvcomm_vllm.kernels.cpu import coded, lanes

    def forget() -> None:
        for function in ("coded_kernel", "_code_reader", "_readers", "_adder", "_writers"):
            getattr(coded, function).cache_clear()

    monkeypatch.setattr(lanes, "HAS_BF16", False)
    forget()
    try:
        group = make_group(torch.bfloat16, 32, 64, 64, False)
        assert max(run_both(group, "code-16", *make_slots(32))) < ONE_ROUNDING[torch.bfloat16]
    finally:
        forget()


def test_a_deviation_of_zero_is_rotation_alone() -> None:
    src, dst = make_slots(32)
    undo, redo = (make_rotation(len(src), 64, seed) for seed in (1, 2))
    zero = torch.zeros(1, LAYERS, HEADS, 64)
    row = torch.zeros(len(src), dtype=torch.int64)
    group, plain = (make_group(torch.float32, 32, 64, 64, False) for _ in range(2))
    cpu_correct.load_corrected(group, src, dst, undo, redo, MeanMap(zero, zero, row))
    cpu_load.load(plain, src, dst, undo.then(redo))
    for layer in range(LAYERS):
        assert error(group, plain, layer) < ONE_ROUNDING[torch.float32]


def test_slots_that_are_not_named_stay_as_they_were() -> None:
    group = make_group(torch.bfloat16, 32, 64, 64, False)
    src, dst = make_slots(32)
    kept = torch.ones(PAGES * 32, dtype=torch.bool)
    kept[dst[(src >= 0) & (dst >= 0)]] = False
    slots = kept.nonzero().flatten()
    before = [packing.read(group, layer, slots) for layer in range(LAYERS)]
    undo, redo = (make_rotation(len(src), 64, seed) for seed in (1, 2))
    for kind in DEVIATIONS:
        deviation = make_deviation(kind, 64, len(src), 1)
        cpu_correct.load_corrected(group, src, dst, undo, redo, deviation)
    for layer, then in enumerate(before):
        for now, old in zip(packing.read(group, layer, slots), then, strict=True):
            assert torch.equal(now, old)
