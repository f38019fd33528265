# SPDX-License-Identifier: Apache-2.0
"""What a lesson has taught is solved in pieces no request feels, and used once all is there."""

from __future__ import annotations

import pytest
import torch
from test_residual_estimator import Anchor, anchor, arena, predict, take_in, teach
from torch.utils._python_dispatch import TorchDispatchMode

from kvcomm_vllm.worker.corrections.residual import ResidualArena

LAYERS = 2  # of these arenas: of three, the first has no deviation


def same(a: ResidualArena, b: ResidualArena) -> bool:
    return all(torch.equal(part, b._parts[name]) for name, part in a._parts.items())


def pieces(a: ResidualArena, layers: int) -> int:
    count = 0
    while a.unsolved:
        a.solve(layers)
        count += 1
    return count


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_pieces_give_what_one_solution_gives(layers: int) -> None:
    at_once, piecewise = arena(), arena()
    for seed in range(3):
        teach(at_once, 1, anchor(30 + seed, seed))
        take_in(piecewise, 1, anchor(30 + seed, seed))
        assert pieces(piecewise, layers) == -(-LAYERS // layers)
        assert same(at_once, piecewise)


def test_corrections_are_the_old_ones_until_all_layers_are_solved() -> None:
    a, raw = arena(), anchor(10, 5).raw
    teach(a, 0, anchor(30, 1))
    before = [predict(a, 0, raw, layer) for layer in range(LAYERS)]
    take_in(a, 0, anchor(30, 2))
    a.solve(1)
    assert a.unsolved
    for layer in range(LAYERS):
        assert torch.equal(predict(a, 0, raw, layer), before[layer])
    a.solve(1)
    assert not a.unsolved
    for layer in range(LAYERS):
        assert not torch.equal(predict(a, 0, raw, layer), before[layer])


def test_a_lesson_that_comes_too_early_has_the_one_before_solved_first() -> None:
    """Its errors are those of predictions that know of all lessons before."""
    patient, hasty = arena(), arena()
    errors = []
    for a in (patient, hasty):
        take_in(a, 0, anchor(30, 1))
        a.solve(1)
        if a is patient:
            a.solve(1)
        errors.append(teach(a, 0, anchor(30, 2)))
    assert errors[0] == errors[1]
    assert same(patient, hasty)


def test_a_placeholder_that_begins_anew_has_nothing_unsolved() -> None:
    a = arena()
    take_in(a, 0, anchor(30, 1))
    a.solve(1)
    a.reset(1)
    assert a.unsolved, "that was another one"
    a.reset(0)
    assert not a.unsolved
    assert same(a, arena())
    teach(a, 0, anchor(30, 2))
    new = arena()
    teach(new, 0, anchor(30, 2))
    assert same(a, new)


def test_what_has_no_solution_fails_once_and_hinders_no_other() -> None:
    a = arena()
    broken = anchor(30, 1)
    broken.raw[3] = float("nan")
    take_in(a, 0, broken)
    with pytest.raises(RuntimeError):
        a.solve(LAYERS)
    assert not a.unsolved
    teach(a, 1, anchor(30, 2))
    assert torch.isfinite(predict(a, 1, anchor(9, 5).raw, 0)).all()


def test_a_device_that_is_warm_has_learned_nothing() -> None:
    a = arena()
    a.warm_up()
    assert same(a, arena())
    assert not a.unsolved


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket
        if name in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.count += 1
        if name in (torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten.index_put):
            self.count += any(i is not None and i.dtype is torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


def waits(a: ResidualArena, given: Anchor) -> int:
    with Waits() as seen:
        take_in(a, 0, given, judged_from=4)
    return seen.count


def test_taking_an_anchor_in_waits_for_a_device_for_its_answer_alone() -> None:
    """Which is one list of numbers, and not counted here."""
    a = arena()
    assert waits(a, anchor(30, 1)) == 0
    a.solve(LAYERS)
    assert waits(a, anchor(30, 2)) == 0
