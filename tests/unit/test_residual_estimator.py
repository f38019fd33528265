# SPDX-License-Identifier: Apache-2.0
"""The residual estimator keeps sums only, and predicts what a fit to all anchors at once would."""

import dataclasses

import pytest
import torch

from kvcomm_vllm.anchors.estimators.residual import (
    ResidualArena,
    ResidualSettings,
    reduced_rank,
    slot_bytes,
)
from kvcomm_vllm.kernels.pages import Packing, PageGroup
from kvcomm_vllm.kernels.reference import deviate

LAYERS, HEADS, DIM = 3, 2, 8
SETTINGS = ResidualSettings(head_tokens=4, mean_prior=0.3, ridge=0.3, ridge_tokens=20, map_rank=0)


def group(dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> PageGroup:
    caches = tuple(torch.zeros(2, HEADS, 16, 2 * DIM, dtype=dtype) for _ in range(layers))
    return PageGroup(caches, Packing.STRIDED, DIM, DIM)


def arena(capacity: int = 2, skip_layers: int = 1, rank: int = 0) -> ResidualArena:
    settings = dataclasses.replace(SETTINGS, map_rank=rank)
    return ResidualArena(group(), capacity, settings, skip_layers)


def anchor(tokens: int, seed: int, rank: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer a base and a deviation that is partly linear in it (by a map of this rank, or any
    map), partly of its index.
    """
    draw = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(999)
    pairs = []
    for _ in range(LAYERS - 1):
        linear = torch.randn(HEADS, 2 * DIM, 2 * DIM, generator=fixed) * 0.2
        if rank:
            linear = linear[..., :rank] @ torch.randn(HEADS, rank, 2 * DIM, generator=fixed)
        by_index = (
            torch.randn(64, HEADS, 2 * DIM, generator=fixed) * (torch.arange(64) < 4)[:, None, None]
        )
        x = torch.randn(tokens, HEADS, 2 * DIM, generator=draw) * 2 + 5
        d = torch.einsum("thi,hij->thj", x - 5, linear) + by_index[:tokens]
        pairs.append((x, d))
    return pairs


def predict(a: ResidualArena, entry: int, x: torch.Tensor, layer: int) -> torch.Tensor:
    index = torch.arange(len(x), dtype=torch.int32)
    keep = torch.ones(len(x), dtype=torch.bool)
    dk, dv = deviate(a.deviation(entry, index), layer, keep, x[..., :DIM], x[..., DIM:])
    return torch.cat((dk, dv), dim=-1)


def fit_at_once(
    anchors: list[list[tuple[torch.Tensor, torch.Tensor]]], layer: int, x: torch.Tensor
) -> torch.Tensor:
    """The estimator as ../shared/fidelity.md words it, from all anchors' tokens, in fp64."""
    rows = torch.cat([torch.arange(len(a[layer][0])) for a in anchors]).clamp(max=4)
    base = torch.cat([a[layer][0] for a in anchors]).double()
    change = torch.cat([a[layer][1] for a in anchors]).double()

    def means(values: torch.Tensor) -> torch.Tensor:
        prior = SETTINGS.mean_prior
        rest = values.mean(0)
        found = [
            (values[rows == r].sum(0) + prior * rest) / ((rows == r).sum() + prior)
            for r in range(5)
        ]
        return torch.stack(found)

    m_x, m_d = means(base), means(change)
    new_rows = torch.arange(len(x)).clamp(max=4)
    out = torch.empty(len(x), HEADS, 2 * DIM, dtype=torch.float64)
    for head in range(HEADS):
        cx, cd = (base - m_x[rows])[:, head], (change - m_d[rows])[:, head]
        spread = cx.square().mean(0).sqrt()
        z = cx / spread
        inner = z.T @ z + SETTINGS.ridge * (len(z) + SETTINGS.ridge_tokens) * torch.eye(
            2 * DIM, dtype=torch.float64
        )
        map_ = torch.linalg.inv(inner) @ z.T @ cd
        new = (x.double() - m_x[new_rows])[:, head] / spread
        out[:, head] = m_d[new_rows][:, head] + new @ map_
    return out


@pytest.mark.parametrize("lengths", [(9,), (30, 12), (20, 3, 40, 17)], ids=str)
def test_streaming_sums_predict_what_one_fit_to_all_anchors_predicts(lengths):
    a = arena()
    anchors = [anchor(length, seed) for seed, length in enumerate(lengths)]
    for given in anchors:
        a.learn(1, torch.arange(len(given[0][0])), given, judged_from=0)
    x, _ = anchor(25, 77)[0]
    for layer in range(LAYERS - 1):
        want = fit_at_once(anchors, layer, x)
        got = predict(a, 1, x, layer).double()
        assert (got - want).norm() / want.norm() < 1e-3


def predictions(rank: int, of_rank: int) -> torch.Tensor:
    a = arena(rank=rank)
    for seed in range(6):
        a.learn(1, torch.arange(40), anchor(40, seed, of_rank), judged_from=0)
    x, _ = anchor(25, 77)[0]
    return torch.stack([predict(a, 1, x, layer) for layer in range(LAYERS - 1)])


def test_factors_of_a_low_rank_predict_what_a_map_of_that_rank_does():
    whole, three = predictions(rank=0, of_rank=3), predictions(rank=3, of_rank=3)
    assert (three - whole).norm() / whole.norm() < 0.02
    assert (predictions(rank=2, of_rank=3) - whole).norm() / whole.norm() > 0.05


def test_full_rank_is_the_whole_map_and_one_less_loses_little():
    whole = predictions(rank=0, of_rank=0)
    assert torch.equal(predictions(rank=2 * DIM, of_rank=0), whole)
    assert arena(rank=2 * DIM).deviation(0, torch.zeros(1, dtype=torch.int32)).up is None
    assert (predictions(rank=2 * DIM - 1, of_rank=0) - whole).norm() / whole.norm() < 0.05


def test_the_rank_is_spent_on_what_inputs_do_not_on_what_the_map_holds():
    """Channels of very different spread: the loss is the least there is (Eckart and Young), which
    the leading singular values of the map itself do not reach.
    """
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(3, 400, 24, generator=draw) * torch.logspace(-1.5, 0.5, 24)
    second = x.mT @ x
    map_ = torch.randn(3, 24, 24, generator=draw)
    down, up = reduced_rank(map_, second @ map_, 6)
    whole = x @ map_
    best = torch.linalg.svdvals(whole)[:, 6:].square().sum(-1).sqrt()
    left = (whole - x @ down @ up).flatten(1).norm(dim=1)
    assert bool((left < 1.02 * best).all())
    u, sigma, v = torch.linalg.svd(map_)
    of_map = (u[..., :6] * sigma[:, None, :6]) @ v[:, :6]
    assert bool(((whole - x @ of_map).flatten(1).norm(dim=1) > 1.2 * left).all())


def test_errors_fall_as_anchors_come_and_are_of_anchors_not_seen_before():
    a, shares = arena(), []
    for seed in range(8):
        sums = a.learn(0, torch.arange(40), anchor(40, seed), judged_from=0)
        shares.append((sums.k_left + sums.v_left) / (sums.k_all + sums.v_all))
    assert shares[0] == 1.0  # nothing was known
    assert shares[-1] < shares[1] < 1.0
    assert shares[-1] < 0.15


def test_means_alone_are_judged_beside_the_map_and_can_be_had_alone():
    a = arena()
    for seed in range(6):
        sums = a.learn(0, torch.arange(40), anchor(40, seed), judged_from=0)
    assert sums.k_left < sums.k_means < sums.k_all  # what is to be learned here is a map
    index = torch.arange(10, dtype=torch.int32)
    alone, both = a.deviation(0, index, mapped=False), a.deviation(0, index)
    assert alone.map is None
    # a slot's mean input is mapped to its mean deviation, whichever way it is written down
    assert not torch.equal(alone.mean_k, both.mean_k)


def test_one_slot_does_not_touch_another_and_a_reset_forgets_all():
    a = arena()
    a.learn(0, torch.arange(20), anchor(20, 1), judged_from=0)
    x, _ = anchor(10, 5)[0]
    assert not predict(a, 1, x, 0).any()
    assert predict(a, 0, x, 0).any()
    a.reset(0)
    assert not predict(a, 0, x, 0).any()


@pytest.mark.parametrize("rank", [0, 3])
def test_stated_bytes_are_what_the_arena_takes(rank):
    settings = dataclasses.replace(SETTINGS, map_rank=rank)
    for dtype in (torch.float32, torch.bfloat16):
        g = group(dtype, layers=4)
        a = ResidualArena(g, 3, settings, skip_layers=1)
        taken = sum(part.nbytes for part in a._parts)
        assert taken <= 3 * slot_bytes(g, 1, settings)
        assert taken > 0.9 * 3 * slot_bytes(g, 1, settings)


def test_an_8b_model_needs_at_most_150_mb_a_slot_with_defaults_and_200_with_whole_maps():
    caches = tuple(
        torch.empty(1, 8, 16, 256, dtype=torch.bfloat16, device="meta") for _ in range(32)
    )
    llama = PageGroup(caches, Packing.STRIDED, 128, 128)
    assert slot_bytes(llama, 1, ResidualSettings(8, 1.0, 0.8, 500, 16)) <= 150e6
    assert slot_bytes(llama, 1, ResidualSettings(8, 1.0, 0.8, 500, 0)) <= 200e6
