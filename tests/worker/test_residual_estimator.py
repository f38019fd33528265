# SPDX-License-Identifier: Apache-2.0
"""The residual estimator keeps sums only, and predicts what a fit to all anchors at once would."""

import dataclasses

import numpy as np
import pytest
import torch

from kvcomm_vllm.config.estimator import EstimatorConfig
from kvcomm_vllm.kernels.deviation import MeanMap
from kvcomm_vllm.kernels.pages import Packing, PageGroup
from kvcomm_vllm.kernels.reference import deviate
from kvcomm_vllm.worker.corrections.base import ErrorSums
from kvcomm_vllm.worker.corrections.residual import (
    ResidualArena,
    mean_rows,
    placeholder_bytes,
)

LAYERS, HEADS, DIM = 3, 2, 8
WIDTH = LAYERS * HEADS * 2 * DIM  # all layers are looked at
SETTINGS = EstimatorConfig(
    head_tokens=4, mean_prior=0.3, ridge=0.3, ridge_tokens=20, map_inputs=WIDTH, map_rank=10_000
)


def group(dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> PageGroup:
    caches = tuple(torch.zeros(2, HEADS, 16, 2 * DIM, dtype=dtype) for _ in range(layers))
    return PageGroup(caches, Packing.STRIDED, DIM, DIM)


def arena(capacity: int = 2, skip_layers: int = 1, **settings: int) -> ResidualArena:
    return ResidualArena(group(), capacity, dataclasses.replace(SETTINGS, **settings), skip_layers)


@dataclasses.dataclass(frozen=True)
class Anchor:
    """Raw features ``[tokens, raw_width]``; deviations ``[layers, tokens, heads, 2 * dim]``."""

    raw: torch.Tensor
    deviations: torch.Tensor

    @property
    def index(self) -> torch.Tensor:
        return torch.arange(len(self.raw))


def anchor(tokens: int, seed: int, rank: int = WIDTH) -> Anchor:
    """A deviation that is partly linear in the base's KV, through so many of its directions, and
    partly of its index.
    """
    draw = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(999)
    outputs = HEADS * 2 * DIM
    linear = torch.randn(LAYERS - 1, WIDTH, rank, generator=fixed) * 0.1
    linear = linear @ torch.randn(LAYERS - 1, rank, outputs, generator=fixed) / rank**0.5
    by_index = torch.randn(LAYERS - 1, 64, outputs, generator=fixed)
    by_index[:, 4:] = 0
    raw = torch.randn(tokens, WIDTH, generator=draw) * 2 + 5
    return Anchor(raw, ((raw - 5) @ linear + by_index[:, :tokens]).unflatten(-1, (HEADS, 2 * DIM)))


def teach(a: ResidualArena, entry: int, given: Anchor, judged_from: int = 0) -> ErrorSums:
    sums = take_in(a, entry, given, judged_from)
    a.solve(a.layers)
    return sums


def take_in(a: ResidualArena, entry: int, given: Anchor, judged_from: int = 0) -> ErrorSums:
    return a.learn(entry, given.index, given.raw, given.deviations, judged_from)


def predict(a: ResidualArena, entry: int, raw: torch.Tensor, layer: int) -> torch.Tensor:
    """``[tokens, heads * 2 * dim]``, by the correction that a load is given."""
    keep = torch.ones(len(raw), dtype=torch.bool)
    return torch.cat(deviate(correction(a, entry, raw), layer, keep), dim=-1).flatten(1)


def correction(a: ResidualArena, entry: int, raw: torch.Tensor, mapped: bool = True) -> MeanMap:
    """Of tokens 0 .. of a placeholder, in one load."""
    index = np.arange(len(raw), dtype=np.int32)
    entries, kinds = np.full_like(index, entry), np.full(len(index), mapped)
    row = torch.from_numpy(mean_rows(entries, kinds, index, a.settings))
    whose = torch.from_numpy(entries)
    code = a.codes(raw, torch.from_numpy(index), whose) if mapped else None
    return a.correction(row, whose, code)


def fit_at_once(a: ResidualArena, anchors: list[Anchor], layer: int, raw: torch.Tensor):
    """Means and ridge map from the tokens of all anchors, in fp64."""
    factor, offset = a.features.spread(anchors[0].raw)

    def features(raw: torch.Tensor) -> torch.Tensor:
        return a.features.of(raw, factor, offset, torch.arange(len(raw))).double()

    rows = torch.cat([given.index for given in anchors]).clamp(max=4)
    base = torch.cat([features(given.raw) for given in anchors])
    change = torch.cat([given.deviations[layer].flatten(1) for given in anchors]).double()

    def means(values: torch.Tensor) -> torch.Tensor:
        prior = SETTINGS.mean_prior
        rest = values.mean(0)
        found = [
            (values[rows == r].sum(0) + prior * rest) / ((rows == r).sum() + prior)
            for r in range(5)
        ]
        return torch.stack(found)

    m_x, m_d = means(base), means(change)
    new_rows = torch.arange(len(raw)).clamp(max=4)
    cx, cd = base - m_x[rows], change - m_d[rows]
    spread = cx.square().mean(0).sqrt()
    z = cx / spread
    penalty = SETTINGS.ridge * (len(z) + SETTINGS.ridge_tokens)
    inner = z.T @ z + penalty * torch.eye(z.shape[1], dtype=torch.float64)
    map_ = torch.linalg.inv(inner) @ z.T @ cd
    return m_d[new_rows] + (features(raw) - m_x[new_rows]) / spread @ map_


@pytest.mark.parametrize("inputs", [WIDTH, WIDTH // 3], ids=["kept", "folded"])
@pytest.mark.parametrize("lengths", [(9,), (30, 12), (20, 3, 40, 17)], ids=str)
def test_streaming_sums_predict_what_one_fit_to_all_anchors_predicts(lengths, inputs):
    a = arena(map_inputs=inputs)
    anchors = [anchor(length, seed) for seed, length in enumerate(lengths)]
    for given in anchors:
        teach(a, 1, given)
    new = anchor(25, 77).raw
    for layer in range(LAYERS - 1):
        want = fit_at_once(a, anchors, layer, new)
        got = predict(a, 1, new, layer).double()
        assert (got - want).norm() / want.norm() < 1e-3


def predictions(rank: int, of_rank: int) -> torch.Tensor:
    a = arena(map_rank=rank)
    for seed in range(6):
        teach(a, 1, anchor(60, seed, of_rank))
    raw = anchor(25, 77).raw
    return torch.stack([predict(a, 1, raw, layer) for layer in range(LAYERS - 1)])


def test_codes_as_short_as_the_map_is_low_in_rank_lose_little_and_shorter_ones_more():
    whole = predictions(rank=10_000, of_rank=3)
    assert (predictions(rank=3, of_rank=3) - whole).norm() / whole.norm() < 0.1
    assert (predictions(rank=2, of_rank=3) - whole).norm() / whole.norm() > 0.15


def test_codes_are_never_longer_than_the_map_has_inputs_or_outputs():
    assert arena(map_rank=10_000).rank == HEADS * 2 * DIM
    assert arena(map_inputs=16, map_rank=10_000).rank == 20


def test_errors_fall_as_anchors_come_and_are_of_anchors_not_seen_before():
    a, shares = arena(), []
    for seed in range(8):
        sums = teach(a, 0, anchor(40, seed))
        shares.append((sums.k_left + sums.v_left) / (sums.k_all + sums.v_all))
    assert shares[0] == 1.0  # nothing was known
    assert shares[-1] < shares[1] < 1.0
    assert shares[-1] < 0.15


def test_means_alone_are_judged_beside_the_map_and_can_be_had_alone():
    a = arena()
    for seed in range(6):
        sums = teach(a, 0, anchor(40, seed))
    assert sums.k_left < sums.k_means < sums.k_all  # what is to be learned here is a map
    raw = anchor(10, 5).raw
    alone, both = (correction(a, 0, raw, mapped) for mapped in (False, True))
    assert alone.code is None
    # a placeholder's mean input is mapped to its mean deviation, whichever way it is written down
    assert not torch.equal(alone.mean_k[alone.row], both.mean_k[both.row])


def test_placeholders_in_one_load_are_corrected_as_if_they_were_loaded_alone():
    """By map and by means alone, in no order."""
    a = arena(capacity=3)
    for entry in range(3):
        teach(a, entry, anchor(40, entry))
    draw = np.random.default_rng(0)
    entry, index = draw.integers(0, 3, 30), draw.integers(0, 60, 30)
    mapped, raw = draw.integers(0, 2, 30).astype(bool), anchor(30, 9).raw

    def load(tokens: np.ndarray) -> torch.Tensor:
        rows = mean_rows(entry[tokens], mapped[tokens], index[tokens], SETTINGS)
        whose = torch.from_numpy(np.where(mapped, entry, -1)[tokens].astype(np.int32))
        at = torch.from_numpy(index[tokens].astype(np.int32))
        code = a.codes(raw[tokens], at, whose)
        change = a.correction(torch.from_numpy(rows), whose, code)
        keep = torch.ones(len(rows), dtype=torch.bool)
        layers = [deviate(change, layer, keep) for layer in range(LAYERS - 1)]
        return torch.stack([torch.cat(layer, dim=-1) for layer in layers], dim=1)

    together = load(np.arange(30))
    for token in range(30):
        torch.testing.assert_close(together[token : token + 1], load(np.array([token])))


def test_one_placeholder_does_not_touch_another_and_a_reset_forgets_all():
    a = arena()
    teach(a, 0, anchor(20, 1))
    x = anchor(10, 5).raw
    assert not predict(a, 1, x, 0).any()
    assert predict(a, 0, x, 0).any()
    a.reset(0)
    assert not predict(a, 0, x, 0).any()


def test_stated_bytes_are_what_the_arena_takes():
    for dtype in (torch.float32, torch.bfloat16):
        g = group(dtype, layers=4)
        a = ResidualArena(g, 3, SETTINGS, skip_layers=1)
        taken = sum(part.nbytes for part in a._parts.values())
        assert taken == 3 * placeholder_bytes(g, 1, SETTINGS)


def test_an_8b_model_needs_at_most_200_mb_a_placeholder_with_defaults():
    caches = tuple(
        torch.empty(1, 8, 16, 256, dtype=torch.bfloat16, device="meta") for _ in range(32)
    )
    llama = PageGroup(caches, Packing.STRIDED, 128, 128)
    assert 100e6 < placeholder_bytes(llama, 1, EstimatorConfig()) <= 200e6
