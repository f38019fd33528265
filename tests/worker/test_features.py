# SPDX-License-Identifier: Apache-2.0
"""Features describe a token by its KV without its position, in numbers that do not grow with the
model.
"""

import pytest
import torch

from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation
from kvcomm_vllm.kernels.reference import load
from kvcomm_vllm.worker.corrections.features import Features

HEADS, DIM, PAGES, PAGE = 2, 8, 4, 16


def group(layers: int, seed: int = 0) -> PageGroup:
    draw = torch.Generator().manual_seed(seed)
    caches = tuple(torch.randn(PAGES, HEADS, PAGE, 2 * DIM, generator=draw) for _ in range(layers))
    return PageGroup(caches, Packing.STRIDED, DIM, DIM)


def turn(tokens: int, seed: int = 1) -> Rotation:
    angle = torch.rand(tokens, DIM // 2, generator=torch.Generator().manual_seed(seed)) * 6
    return Rotation(angle.cos(), angle.sin())


@pytest.mark.parametrize(("layers", "looked_at"), [(1, 1), (2, 2), (6, 6), (30, 6), (61, 6)])
def test_a_few_layers_are_looked_at_the_first_and_the_last_among_them(layers, looked_at):
    pages = group(layers)
    features = Features(pages, inputs=10_000)
    assert len(features.pages.layers) == looked_at
    assert features.pages.layers[0] is pages.layers[0]
    assert features.pages.layers[-1] is pages.layers[-1]
    assert features.raw_width == looked_at * HEADS * 2 * DIM


def test_scales_of_fp8_layers_go_with_their_layers():
    caches = tuple(torch.zeros(1, 1, 16, 16, dtype=torch.float8_e4m3fn) for _ in range(11))
    scales = tuple(float(i) for i in range(11))
    pages = PageGroup(caches, Packing.STRIDED, 8, 8, k_scales=scales, v_scales=scales)
    chosen = Features(pages, 64).pages
    assert chosen.k_scales == chosen.v_scales == (0.0, 2.0, 4.0, 6.0, 8.0, 10.0)


def test_raw_features_are_the_pages_kv_with_its_rotation_undone():
    pages = group(2)
    features, slots = Features(pages, 10_000), torch.tensor([5, 40, 17])
    plain = features.raw(slots, Rotation(torch.ones(3, DIM // 2), torch.zeros(3, DIM // 2)))
    want = torch.stack([c[slots // PAGE, :, slots % PAGE] for c in pages.layers], dim=1)
    assert torch.equal(plain, want.flatten(1))
    forth = turn(3)
    load(pages, slots, slots, forth)
    back = features.raw(slots, Rotation(forth.cos, -forth.sin))
    torch.testing.assert_close(back, plain)


def test_kv_that_fits_is_kept_and_kv_that_does_not_is_folded_to_less_than_was_asked_for():
    pages = group(6)  # 6 * 2 * 16 = 192 numbers
    whole, folded = Features(pages, 192), Features(pages, 100)
    assert (whole.folds, whole.inputs) == (1, 192)
    assert (folded.folds, folded.inputs) == (2, 96)
    assert Features(pages, 50).inputs == 48
    raw, index = torch.randn(7, 192), torch.arange(7)
    factor, none = torch.ones(192), torch.zeros(192)
    assert torch.equal(whole.of(raw, factor, none, index)[:, :192], raw)
    assert torch.equal(folded.of(raw, factor, none[:96], index)[:, :96], raw[:, :96] + raw[:, 96:])


def test_folding_keeps_distances_on_average():
    features = Features(group(6), 48)
    draw = torch.Generator().manual_seed(3)
    raw = torch.randn(200, 192, generator=draw) * torch.logspace(-1, 1, 192)
    factor, offset = features.spread(raw)
    of = features.of(raw, factor, offset, torch.zeros(200))[:, : features.inputs]
    squares = of.square().sum(1).mean() * features.folds / 192
    assert 0.9 < float(squares) < 1.1


def test_the_index_fades_and_stays_bounded_however_long_a_placeholder_is():
    features = Features(group(2), 10_000)
    raw = torch.zeros(3, features.raw_width)
    index = torch.tensor([0, 100, 100_000])
    of = features.of(raw, raw[0], raw[0, : features.inputs], index)[:, -4:]
    assert not of[0].any()
    assert torch.equal(of[2], -torch.ones(4))
    assert bool((of[1].diff() > 0).all())


def test_what_was_equal_in_the_first_anchor_does_not_outweigh_all_else_later():
    features = Features(group(2), 10_000)
    raw = torch.randn(4, features.raw_width, generator=torch.Generator().manual_seed(2))
    raw[:, 5] = raw[0, 5]
    for first in (raw, raw[:1]):
        factor, offset = features.spread(first)
        assert bool((factor[5] <= 200 * factor.median()).all())
        assert bool(features.of(raw, factor, offset, torch.arange(4)).isfinite().all())
