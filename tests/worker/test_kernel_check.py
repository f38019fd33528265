# SPDX-License-Identifier: Apache-2.0
"""A kernel that corrects otherwise than its reference is found at start, and no other is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.kernels import reference
from kvcomm_vllm.kernels.cpu import correct as cpu_correct
from kvcomm_vllm.kernels.deviation import AnchorSum, Deviation, MeanMap
from kvcomm_vllm.kernels.pages import Packing, PageGroup
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.kernel_check import check_corrections
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.corrections.anchor import Anchors
from kvcomm_vllm.worker.corrections.base import Ground
from kvcomm_vllm.worker.corrections.paper import PaperArena
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.rope import Rope

HEADS, DIM, PAGE, LAYERS, LATENT = 2, 32, 16, 3, 48
KINDS = ("means", "map", "sum")


def pages(packing: Packing = Packing.VEC, dtype: torch.dtype = torch.float32) -> PageGroup:
    heads, both = (1, LATENT + DIM) if packing is Packing.LATENT else (HEADS, 2 * DIM)
    caches = tuple(torch.zeros(4, heads, PAGE, both, dtype=dtype) for _ in range(LAYERS))
    return PageGroup(caches, packing, DIM, DIM)


def deviation(kind: str, group: PageGroup) -> Deviation:
    """Of one token, without numbers."""
    shape = (1, LAYERS - 1, group.kv_heads)
    k, v = torch.zeros(*shape, group.head_dim), torch.zeros(*shape, group.value_dim)
    row, entry = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    code, up = torch.zeros(1, LAYERS - 1, 16), torch.zeros(*shape, 16, group.row_dim)
    one = torch.ones(1, 1)
    if kind == "sum":
        return AnchorSum(k, v, one.long(), one, one, 1)
    if kind == "means":
        return MeanMap(k, v, row, skip_layers=1)
    return MeanMap(k, v, row, code, up, entry, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packing", Packing)
def test_a_right_kernel_passes_and_leaves_the_pages_empty(
    packing: Packing, dtype: torch.dtype, kind: str
) -> None:
    group = pages(packing, dtype)
    check_corrections([(group, deviation(kind, group))], cpu_correct.load_corrected)
    assert not any(page.any() for page in group.layers)


def adds_nothing(deviation: Any) -> Any:
    values = ("mean_k", "mean_v") if isinstance(deviation, MeanMap) else ("dk", "dv")
    return replace(deviation, **{name: getattr(deviation, name) * 0 for name in values})


def forgets_values(deviation: Any) -> Any:
    name = "mean_v" if isinstance(deviation, MeanMap) else "dv"
    return replace(deviation, **{name: getattr(deviation, name) * 0})


def takes_the_next_row(deviation: Any) -> Any:
    name = "row" if isinstance(deviation, MeanMap) else "rows"
    return replace(deviation, **{name: getattr(deviation, name).roll(1, -1)})


def corrects_the_first_layer(deviation: Any) -> Any:
    def longer(name: str) -> torch.Tensor:
        part: torch.Tensor = getattr(deviation, name)
        return torch.cat((part[:, :1], part), 1)

    names = ("mean_k", "mean_v") if isinstance(deviation, MeanMap) else ("dk", "dv")
    if isinstance(deviation, MeanMap) and deviation.code is not None:
        names += ("code", "up")
    return replace(deviation, skip_layers=0, **{name: longer(name) for name in names})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wrong", [adds_nothing, forgets_values, takes_the_next_row, corrects_the_first_layer]
)
def test_a_kernel_that_does_something_else_is_refused(
    wrong: Callable[[Any], Any], kind: str
) -> None:
    def kernel(*given: Any) -> None:
        *others, deviation = given
        reference.load_corrected(*others, wrong(deviation))

    with pytest.raises(Unsupported, match="corrected") as found:
        check_corrections([(pages(), deviation(kind, pages()))], kernel)
    assert found.value.reason is Reason.SELF_CHECK_FAILED


def test_the_map_of_another_placeholder_is_refused() -> None:
    def kernel(*given: Any) -> None:
        *others, deviation = given
        reference.load_corrected(*others, replace(deviation, entry=1 - deviation.entry))

    with pytest.raises(Unsupported, match="corrected"):
        check_corrections([(pages(), deviation("map", pages()))], kernel)


@pytest.mark.parametrize(
    ("made", "kernel", "settings"),
    [
        (Anchors, "kernel", {"mode": "anchor", "max_placeholders": 2}),
        (PaperArena, "correct", {"mode": "paper", "paper": {"memory_mb": 1}}),
    ],
    ids=["anchor", "paper"],
)
def test_each_mode_checks_what_it_loads_with(
    made: Callable[[Ground], Any], kernel: str, settings: dict[str, Any]
) -> None:
    table = torch.zeros(64, DIM // 2)
    group = LayerGroup((), pages(), Rope(table + 1, table, False), None)
    config = KVCommConfig.from_mapping(settings, "test")
    correction = made(Ground([group], config, PAGE, alone=True, single=True))
    assert correction.room > 0
    correction.check()
    setattr(correction, kernel, lambda *_: None)
    with pytest.raises(Unsupported, match="corrected"):
        correction.check()
