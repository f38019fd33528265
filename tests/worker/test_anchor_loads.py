# SPDX-License-Identifier: Apache-2.0
"""Warm placeholders that are loaded together get what each of them gets when it is loaded alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.kernels.pages import Packing, PageGroup
from kvcomm_vllm.messages import LoadOp, RequestOps
from kvcomm_vllm.worker.corrections import anchor
from kvcomm_vllm.worker.corrections.anchor import Anchors
from kvcomm_vllm.worker.corrections.base import Ground
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.rope import Rope

PAGE, PAGES, HEADS, DIM, EACH = 4, 120, 2, 16, 15

loads = st.lists(
    st.builds(
        lambda length, entry, index, mapped, offset: LoadOp(
            list(range(EACH)), offset, 30, 2, length, entry, index, mapped
        ),
        length=st.integers(1, 50),
        entry=st.integers(0, 3),
        index=st.integers(-3, 40),
        mapped=st.booleans(),
        offset=st.integers(0, 3),
    ),
    min_size=1,
    max_size=6,
)


def layer_group(layers: int, seed: int) -> LayerGroup:
    draw = torch.Generator().manual_seed(seed)
    shape = (PAGES, HEADS, PAGE, 2 * DIM)
    caches = tuple(torch.randn(shape, generator=draw) for _ in range(layers))
    angles = torch.arange(200)[:, None] / 50 ** (torch.arange(DIM // 2) / (DIM // 2))
    pages = PageGroup(caches, Packing.STRIDED, DIM, DIM)
    return LayerGroup((), pages, Rope(angles.cos(), angles.sin(), False), None)


@pytest.fixture(scope="module")
def anchors() -> Anchors:
    """Four placeholders that have learned anything whatever."""
    config = KVCommConfig.from_mapping(
        {"mode": "anchor", "max_placeholders": 4, "estimator": {"map_inputs": 50}}, "test"
    )
    groups = [layer_group(2, 0), layer_group(3, 1)]
    made = Anchors(Ground(groups, config, PAGE, alone=True, single=True))
    draw = torch.Generator().manual_seed(2)
    for arena in made.arenas:
        for part in arena._parts.values():
            part.copy_(torch.randn(part.shape, generator=draw) / 4)
    return made


def pages_after(anchors: Anchors, steps: list[list[RequestOps]]) -> list[torch.Tensor]:
    """The pages after these steps' loads; they are put back then."""
    caches = [cache for group in anchors.groups for cache in group.pages.layers]
    before = [cache.clone() for cache in caches]
    for step in steps:
        anchors.load(step)
    after = [cache.clone() for cache in caches]
    for cache, old in zip(caches, before, strict=True):
        cache.copy_(old)
    assert any(not torch.equal(new, old) for new, old in zip(after, before, strict=True))
    return after


@settings(max_examples=25, deadline=None, derandomize=True)
@given(step=loads, chunk=st.sampled_from([7, 64, anchor.CHUNK_TOKENS]))
def test_placeholders_loaded_together_are_corrected_as_if_each_were_loaded_alone(
    anchors: Anchors, step: list[LoadOp], chunk: int
) -> None:
    """In pieces of any size, with maps and without, of several requests."""
    requests = [
        RequestOps(str(i), list(range(EACH * (i + 1), EACH * (i + 2))), [load], [])
        for i, load in enumerate(step)
    ]
    alone = pages_after(anchors, [[ops] for ops in requests])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anchor, "CHUNK_TOKENS", chunk)
        together = pages_after(anchors, [requests])
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)
