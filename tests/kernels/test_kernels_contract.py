# SPDX-License-Identifier: Apache-2.0
"""A launcher that is called wrongly says what is wrong, before it reads or writes anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_caches import Case, deviation, poisoned_group, rotation

from kvcomm_vllm.kernels import codes, collect, correct, distance, load, reference
from kvcomm_vllm.kernels.contract import ContractError
from kvcomm_vllm.kernels.deviation import AnchorSum, CodeMaps, MeanMap
from kvcomm_vllm.kernels.pages import Packing, PageGroup, Rotation

CASE = Case("bf16", tokens=4)
SRC, DST = torch.tensor([0, 1, 2, 3]), torch.tensor([8, 9, 10, 11])

Break = Callable[[PageGroup], tuple[PageGroup, torch.Tensor, torch.Tensor, Rotation]]


def with_slots(src: list[int], dst: list[int]) -> Break:
    return lambda group: (group, torch.tensor(src), torch.tensor(dst), rotation(CASE))


def with_group(**changes: Any) -> Break:
    return lambda group: (dataclasses.replace(group, **changes), SRC, DST, rotation(CASE))


WRONG: dict[str, tuple[Break, str]] = {
    "duplicate-destination": (with_slots([0, 1], [8, 8]), "occurs twice"),
    "overlap": (with_slots([0, 1], [1, 2]), "also another token's destination"),
    "outside": (with_slots([0, 1], [8, 10_000]), "outside a cache"),
    "lengths": (with_slots([0, 1], [8]), "2 source slots for 1"),
    "int32-slots": (
        lambda group: (group, SRC.int(), DST, rotation(CASE)),
        "src_slots is int64",
    ),
    "rotation-shape": (
        lambda group: (group, SRC, DST, rotation(Case("bf16", tokens=5))),
        "rotation cos is fp32",
    ),
    "rotation-dtype": (
        lambda group: (group, SRC, DST, Rotation(*(torch.zeros(4, 32).half() for _ in "cs"))),
        "rotation cos is fp32",
    ),
    "head-dim": (with_group(head_dim=32), "2 \\* head_dim=64"),
    "rotary-dim": (with_group(rotary_dim=66), "rotary_dim 66"),
    "scales": (with_group(k_scales=(1.0,)), "one factor per layer"),
    "mixed-layers": (
        lambda group: (
            dataclasses.replace(group, layers=(group.layers[0], group.layers[1].float())),
            SRC,
            DST,
            rotation(CASE),
        ),
        "share shape, dtype",
    ),
    "uint8-cache": (
        lambda group: (
            dataclasses.replace(group, layers=tuple(x.clone().byte() for x in group.layers)),
            SRC,
            DST,
            rotation(CASE),
        ),
        "float8 dtype first",
    ),
}


@pytest.mark.parametrize("module", [load, reference], ids=["triton", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_refused_and_leave_the_cache_alone(name: str, module: ModuleType) -> None:
    group = poisoned_group(CASE)
    before = [layer.clone() for layer in group.layers]
    change, message = WRONG[name]
    arguments = change(group)
    if name not in ("duplicate-destination", "overlap", "outside", "lengths"):
        assert len(arguments[1]) == 4
    turn = arguments[3]
    if len(arguments[1]) == 2:
        turn = Rotation(turn.cos[:2], turn.sin[:2])
    with pytest.raises(ContractError, match=message):
        module.load(*arguments[:3], turn)
    for layer, old in zip(group.layers, before, strict=True):
        assert torch.equal(layer.float(), old.float())


def test_packed_cpu_caches_are_refused_by_triton() -> None:
    layers = tuple(torch.zeros(4, 2, 32, 128) for _ in range(2))
    group = PageGroup(layers, Packing.VEC, 64, 64)
    with pytest.raises(ContractError, match="served by the CPU path"):
        load.load(group, SRC, DST, rotation(CASE))


def test_deviations_that_do_not_fit_are_refused() -> None:
    group, turn = poisoned_group(CASE), rotation(CASE)

    def run(change: AnchorSum | MeanMap) -> None:
        correct.load_corrected(group, SRC, DST, turn, turn, change)

    anchors, means = deviation("token", CASE), deviation("code", CASE)
    assert isinstance(anchors, AnchorSum)
    assert isinstance(means, MeanMap)
    assert means.code is not None
    assert means.up is not None
    assert means.entry is not None
    with pytest.raises(ContractError, match="outside an arena"):
        run(dataclasses.replace(anchors, rows=torch.full_like(anchors.rows, 150)))
    with pytest.raises(ContractError, match="deviation arena is"):
        run(dataclasses.replace(anchors, skip_layers=0))
    with pytest.raises(ContractError, match="wk is fp32"):
        run(dataclasses.replace(anchors, wk=anchors.wk[:, :3]))
    with pytest.raises(ContractError, match="mean rows is int64"):
        run(dataclasses.replace(means, row=means.row.int()))
    with pytest.raises(ContractError, match="mean rows: row 40 is outside"):
        run(dataclasses.replace(means, row=torch.full_like(means.row, 40)))
    with pytest.raises(ContractError, match="every token has one"):
        run(dataclasses.replace(means, row=-means.row - 1))
    with pytest.raises(ContractError, match="entry is int32"):
        run(dataclasses.replace(means, entry=means.entry.long()))
    with pytest.raises(ContractError, match="entry 3 is none of 3"):
        run(dataclasses.replace(means, entry=torch.full_like(means.entry, 3)))
    with pytest.raises(ContractError, match="code is a contiguous float tensor"):
        run(dataclasses.replace(means, code=means.code[:3]))
    with pytest.raises(ContractError, match="code is a contiguous float tensor"):
        run(dataclasses.replace(means, code=means.code.int()))
    with pytest.raises(ContractError, match="code is a contiguous float tensor"):
        run(dataclasses.replace(means, code=means.code.repeat(1, 1, 2)[..., ::2]))
    with pytest.raises(ContractError, match="up is a contiguous float tensor"):
        run(dataclasses.replace(means, up=means.up[..., :64].contiguous()))
    with pytest.raises(ContractError, match="up is a contiguous float tensor"):
        run(dataclasses.replace(means, code=means.code[..., :5].contiguous()))
    for alone in ({"code": None}, {"up": None}, {"entry": None}):
        with pytest.raises(ContractError, match="given together"):
            run(dataclasses.replace(means, **alone))
    none = means.code[..., :0].contiguous(), means.up[..., :0, :].contiguous()
    with pytest.raises(ContractError, match="at least one number"):
        run(dataclasses.replace(means, code=none[0], up=none[1]))
    with pytest.raises(ContractError, match="code is on meta"):
        run(dataclasses.replace(means, code=means.code.to("meta")))


@pytest.mark.parametrize("module", [codes, reference], ids=["triton", "reference"])
def test_maps_that_do_not_fit_are_refused(module: ModuleType) -> None:
    maps = CodeMaps(torch.zeros(3, 20), torch.zeros(3, 8), torch.ones(2), torch.zeros(3, 10, 2, 4))
    raw, index = torch.zeros(5, 20), torch.zeros(5, dtype=torch.int32)

    def run(raw: torch.Tensor = raw, entry: torch.Tensor = index, **wrong: Any) -> None:
        module.codes(raw, dataclasses.replace(maps, **wrong), index, entry)

    with pytest.raises(ContractError, match="raw is contiguous fp32"):
        run(torch.zeros(5, 19))
    with pytest.raises(ContractError, match="raw is contiguous fp32"):
        run(torch.zeros(4, 20))
    with pytest.raises(ContractError, match="offset is contiguous fp32"):
        run(offset=torch.zeros(3, 8).half())
    with pytest.raises(ContractError, match="down is a contiguous float tensor"):
        run(down=torch.zeros(3, 8, 2, 4))
    with pytest.raises(ContractError, match="entry is int32"):
        run(entry=index.long())
    with pytest.raises(ContractError, match="entry 3 is none of 3"):
        run(entry=index + 3)


@pytest.mark.parametrize("module", [collect, reference], ids=["triton", "reference"])
def test_slots_that_are_only_read_lie_in_the_cache(module: ModuleType) -> None:
    group, turn, out = poisoned_group(CASE), rotation(CASE), torch.zeros(4, 2, 3, 64)
    with pytest.raises(ContractError, match="outside a cache"):
        module.collect(group, torch.tensor([0, 0, 1, 10_000]), turn, out, out)
    with pytest.raises(ContractError, match="slots are int64"):
        module.collect(group, SRC.int(), turn, out, out)


def test_a_token_may_be_read_several_times() -> None:
    """As by two requests that quote one text."""
    group, out = poisoned_group(CASE), torch.zeros(2, 4, 2, 3, 64)
    still = Rotation(torch.ones(4, 32), torch.zeros(4, 32))
    reference.collect(group, torch.tensor([5, 7, 5, -1]), still, out[0], out[1])
    assert out[:, 0].any()
    assert torch.equal(out[:, 0], out[:, 2])


def test_arenas_that_do_not_fit_are_refused() -> None:
    group, turn = poisoned_group(CASE), rotation(CASE)
    good, bad = torch.zeros(4, 2, 3, 64), torch.zeros(4, 2, 3, 32)
    with pytest.raises(ContractError, match="out is"):
        collect.collect(group, SRC, turn, bad, bad)
    longer = torch.zeros(5, 2, 3, 64)
    with pytest.raises(ContractError, match="5 output rows for 4 slots"):
        collect.collect(group, SRC, turn, longer, longer)
    with pytest.raises(ContractError, match=r"rows is int64"):
        distance.distance(group, SRC, turn, good, good, torch.zeros(2, 3, dtype=torch.int64))
