# SPDX-License-Identifier: Apache-2.0
"""Anchors take what is free on the device and leave a gigabyte; the start line says if it is less
than was asked for. (A device's memory is made up here.)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcomm_vllm.compat.device import free_memory
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.kernels.pages import Packing, PageGroup
from kvcomm_vllm.worker.corrections import registry
from kvcomm_vllm.worker.corrections.base import Ground
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.rope import Rope

MIB = 2**20
LAYERS, HEADS, DIM = 3, 2, 16


class Device:
    """A GPU of so many MiB, on which the arenas made are counted."""

    def __init__(self, free_mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = free_mib * MIB
        zeros = torch.zeros

        def counted(*shape: Any, **more: Any) -> torch.Tensor:
            made = zeros(*shape, **more)
            self.free -= made.numel() * made.element_size()
            return made

        monkeypatch.setattr(torch, "zeros", counted)
        monkeypatch.setattr(
            "kvcomm_vllm.worker.corrections.registry.free_memory", lambda device: self.free
        )


def reserve(**settings: Any) -> tuple[dict[str, Any], str]:
    angles = torch.arange(64)[:, None] / 50 ** (torch.arange(DIM // 2) / (DIM // 2))
    layers = tuple(torch.ones(4, HEADS, 16, 2 * DIM) for _ in range(LAYERS))
    rope = Rope(angles.cos(), angles.sin(), False)
    group = LayerGroup((), PageGroup(layers, Packing.STRIDED, DIM, DIM), rope, None)
    config = KVCommConfig.from_mapping(settings, "test")
    return registry.reserve(Ground([group], config, 16, alone=True, single=True))


def test_all_that_was_asked_for_is_taken_where_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(8192, monkeypatch)
    made, said = reserve(anchor_memory_mb=16)
    each = made["anchor"].bytes_per_placeholder
    assert made["anchor"].room == 16 * MIB // each > 2
    assert said == f"; anchors of {made['anchor'].room} placeholders of {each / MIB:.1f} MB each"
    assert 8192 * MIB - device.free >= made["anchor"].room * each


@pytest.mark.parametrize("more_mib", [9, 0, -500])
def test_a_gigabyte_stays_free_and_the_start_line_says_how_much_is_missing(
    monkeypatch: pytest.MonkeyPatch, more_mib: int
) -> None:
    device = Device(1024 + more_mib, monkeypatch)
    taken = max(0, more_mib)
    before = device.free
    made, said = reserve(anchor_memory_mb=16)
    each = made["anchor"].bytes_per_placeholder
    assert made["anchor"].room == taken * MIB // each < 16 * MIB // each
    assert f"; anchors {taken} of 16 MiB, no more is free on the device: " in said
    example_bytes = 64 * 1024  # of a token each, on which the kernels are checked
    assert device.free >= min(before, registry.SPARE_BYTES) - example_bytes


def test_both_kinds_of_anchors_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(1024 + 6, monkeypatch)
    made, said = reserve(mode="paper", anchor_memory_mb=16, paper={"memory_mb": 16})
    assert made["anchor"].room == 0
    assert made["paper"].room == 6 * MIB // made["paper"].row_bytes
    assert said == (
        "; mode paper: anchors 6 of 16 MiB, no more is free on the device: "
        f"{made['paper'].room} tokens"
    )


def test_on_cpu_the_configuration_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_memory(torch.device("cpu")) is None
    made, said = reserve(anchor_memory_mb=4)
    assert made["anchor"].room == 4 * MIB // made["anchor"].bytes_per_placeholder
    assert "of 4 MiB" not in said


def test_a_gpu_is_asked_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * MIB, 9 * MIB))
    assert free_memory(torch.device("cuda:0")) == 5 * MIB


def test_an_allocation_that_fails_all_the_same_leaves_no_anchors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    def fail(ground: Ground) -> Any:
        if ground.limit != 0:
            raise torch.OutOfMemoryError("somebody else was faster")
        return registry.Anchors(ground)

    monkeypatch.setitem(registry.CORRECTIONS, "anchor", fail)
    made, said = reserve(anchor_memory_mb=4)
    assert made["anchor"].room == 0
    assert said == "; NO ANCHORS: there are no 4 MB for them"
