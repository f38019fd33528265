# SPDX-License-Identifier: Apache-2.0
"""A forward of our own that fails is repaired by a rank that is alone, and by no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_device import worker

from kvcomm_vllm.messages import HoleOp
from kvcomm_vllm.worker.side_forward import RanksApartError, Row, SideForward

ROW = Row([1], HoleOp(0, [5, 6]))


def fails(*_: object, **__: object) -> torch.Tensor:
    raise MemoryError("of this rank")


def forward(patch: pytest.MonkeyPatch, ranks: int) -> SideForward:
    runner = worker(patch).equipment.side_forward.runner
    runner.vllm_config.parallel_config.tensor_parallel_size = ranks
    return SideForward(runner, 16)


@pytest.mark.parametrize(
    "work",
    [lambda side: side.run([ROW]), lambda side: side.last_logits([ROW])],
    ids=["holes", "comparison"],
)
@pytest.mark.parametrize(("ranks", "error"), [(1, MemoryError), (2, RanksApartError)])
def test_what_fails_in_a_forward_of_several_ranks_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    error: type[Exception],
    work: Callable[[SideForward], object],
) -> None:
    side = forward(monkeypatch, ranks)
    side.runner.model = fails
    with pytest.raises(error) as found:
        work(side)
    assert isinstance(found.value if ranks == 1 else found.value.__cause__, MemoryError)


def test_the_last_projection_of_several_ranks_is_one_of_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Model:
        compute_logits = staticmethod(fails)

        def __call__(self, *, positions: torch.Tensor, **_: object) -> torch.Tensor:
            return positions

    side = forward(monkeypatch, 2)
    side.runner.model = Model()
    with pytest.raises(RanksApartError):
        side.last_logits([ROW])
