# SPDX-License-Identifier: Apache-2.0
"""Ridge regression from sums: what a fit to all tokens at once gives, at the lowest loss a rank
allows.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm_vllm.worker.corrections.ridge import about, reduced_rank, row_means, start_directions

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 60), prior=st.floats(0.01, 10))
def test_moving_sums_to_any_means_equals_summing_what_was_moved(seed, tokens, prior):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 5, (tokens,), generator=draw)
    a = torch.randn(tokens, 7, generator=draw, dtype=torch.float64) + 3
    b = torch.randn(tokens, 4, generator=draw, dtype=torch.float64) - 2
    count = torch.bincount(rows, minlength=5).double()
    sums = [torch.zeros(5, v.shape[1], dtype=v.dtype).index_add_(0, rows, v) for v in (a, b)]
    means = [row_means(s, count, prior) for s in sums]
    moved = (a - means[0][rows]).T @ (b - means[1][rows])
    from_sums = a.T @ b - about(sums[0], means[0], sums[1], means[1], count)
    torch.testing.assert_close(from_sums, moved, rtol=1e-8, atol=1e-8)


def test_a_row_without_tokens_has_the_mean_of_all_and_a_full_one_its_own():
    sums = torch.tensor([[0.0], [300.0]])
    means = row_means(sums, torch.tensor([0.0, 100.0]), prior=1e-3)
    torch.testing.assert_close(means, torch.tensor([[3.0], [3.0]]))
    means = row_means(torch.tensor([[1e6], [0.0]]), torch.tensor([1e6, 1e6]), prior=1.0)
    torch.testing.assert_close(means, torch.tensor([[1.0], [0.0]]), atol=1e-5, rtol=0)


def test_the_rank_is_spent_on_what_inputs_do_not_on_what_the_map_holds():
    """Channels of very different spread: the loss is the least there is (Eckart and Young), which
    the leading singular values of the map itself do not reach.
    """
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(400, 24, generator=draw) * torch.logspace(-1.5, 0.5, 24)
        map_ = torch.randn(24, 24, generator=draw)
        down, up = reduced_rank(map_, x.mT @ x @ map_, 6, start_directions(24, 6, CPU))
        whole = x @ map_
        best = torch.linalg.svdvals(whole)[6:].square().sum().sqrt()
        left = (whole - x @ down @ up).norm()
        assert left < 1.02 * best
        u, sigma, v = torch.linalg.svd(map_)
        of_map = (u[:, :6] * sigma[:6]) @ v[:6]
        assert (whole - x @ of_map).norm() > 1.2 * left


def test_full_rank_loses_nothing():
    draw = torch.Generator().manual_seed(1)
    x, map_ = torch.randn(50, 12, generator=draw), torch.randn(12, 9, generator=draw)
    down, up = reduced_rank(map_, x.mT @ x @ map_, 9, start_directions(9, 9, CPU))
    torch.testing.assert_close(down @ up, map_, rtol=1e-3, atol=1e-4)
