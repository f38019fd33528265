# SPDX-License-Identifier: Apache-2.0
"""The check at start lets every page through that is read as it was written, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strided_layers import Write, group_of, layer
from strided_writes import write_pages
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from kvcomm_vllm.kernels import reference
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.self_check import self_check
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.kv_view import LayerGroup

HEADS, HEAD, BLOCK = 2, 32, 16
TINY, USUAL, LARGE = 1e-3, 1.0, 30.0


@pytest.fixture(scope="module")
def rotary() -> Any:
    with set_current_vllm_config(VllmConfig()):
        return get_rope(HEAD, 4096, True, {"rope_type": "default", "rope_theta": 1e4})


def group(
    rotary: Any,
    kv_dtype: str,
    *scales: tuple[float, float],
    head_major: bool = True,
    write: Write = write_pages,
) -> LayerGroup:
    """Layers with these scales of K and V; pages have heads outside, or tokens."""
    stored = torch.bfloat16 if kv_dtype == "auto" else torch.uint8
    layers = []
    for number, pair in enumerate(scales):
        cache = torch.zeros(4, HEADS, BLOCK, 2 * HEAD, dtype=stored)
        if not head_major:
            cache = torch.zeros(4, BLOCK, HEADS, 2 * HEAD, dtype=stored).transpose(1, 2)
        layers.append(layer(f"layer {number}", cache, kv_dtype, pair, write))
    return group_of(layers, rotary)


def check(group: LayerGroup) -> None:
    self_check([group], BLOCK, reference.load)


@pytest.mark.parametrize("head_major", [True, False], ids=["HND", "NHD"])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8", "fp8_e5m2"])
def test_pages_that_read_as_they_were_written_pass_and_are_left_empty(
    rotary: Any, kv_dtype: str, head_major: bool
) -> None:
    checked = group(rotary, kv_dtype, (1.0, 1.0), head_major=head_major)
    check(checked)
    assert not any(page.view(torch.uint8).any() for page in checked.pages.layers)


@pytest.mark.parametrize("kv_dtype", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("k_scale", [TINY, USUAL, LARGE])
@pytest.mark.parametrize("v_scale", [TINY, USUAL, LARGE])
def test_fp8_pages_with_calibrated_scales_pass(
    rotary: Any, kv_dtype: str, k_scale: float, v_scale: float
) -> None:
    """A scale is an absolute maximum over 448: first layers' V is often far below 1."""
    check(group(rotary, kv_dtype, (USUAL, USUAL), (k_scale, v_scale)))


def writes_larger_values(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    write_pages(layer, key, value * 1.5, cache, slots)


def swaps_halves(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    write_pages(layer, value, key, cache, slots)


def writes_next_to_it(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    write_pages(layer, key, value, cache, slots + 1)


@pytest.mark.parametrize("scales", [(USUAL, USUAL), (USUAL, TINY)], ids=["alike", "small V"])
def test_wrong_values_are_seen_beside_right_keys(rotary: Any, scales: tuple[float, float]) -> None:
    with pytest.raises(Unsupported, match=r"layer 0: values .* written") as caught:
        check(group(rotary, "fp8", scales, write=writes_larger_values))
    assert caught.value.reason is Reason.SELF_CHECK_FAILED


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("write", [swaps_halves, writes_next_to_it])
def test_what_lies_elsewhere_is_refused(rotary: Any, kv_dtype: str, write: Write) -> None:
    with pytest.raises(Unsupported, match=r"layer 0: keys .* written"):
        check(group(rotary, kv_dtype, (0.5, 2.0), write=write))


def test_a_load_that_leaves_keys_where_they_pointed_is_refused(rotary: Any) -> None:
    still = group(None, "auto", (1.0, 1.0))
    turning = LayerGroup(still.layers, still.pages, still.rope, rotary)
    with pytest.raises(Unsupported, match=r"keys .* their place"):
        check(turning)
