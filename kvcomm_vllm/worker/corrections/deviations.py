# SPDX-License-Identifier: Apache-2.0
"""What a lesson shows: how the true KV of a span's tokens differs from the KV it was, or would have
been, loaded from. Whatever rotation keys have is taken off before they are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.pages import Rotation
from kvcomm_vllm.kernels.reference import turn_keys
from kvcomm_vllm.messages import LoadOp
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.load import slots_of


@dataclass(frozen=True)
class Lying:
    """Where tokens lie: their slots, int64 ``[tokens]``, and what takes the rotation off their
    keys.
    """

    slots: torch.Tensor
    undo: Rotation


def base_of(group: LayerGroup, span: LoadOp, block_size: int) -> Lying:
    """Where a span's base KV lies."""
    slots = slots_of(span.source_blocks, span.source_offset, span.length, block_size)
    return _lying(group, slots, span.source_start)


def true_of(group: LayerGroup, span: LoadOp, block_ids: list[int], block_size: int) -> Lying:
    """Where its true KV lies, in the lesson's pages ``block_ids``."""
    slots = slots_of(block_ids, span.prompt_start, span.length, block_size)
    return _lying(group, slots, span.prompt_start)


def deviations(
    group: LayerGroup, base: Lying, true: Lying, skip_layers: int = 0
) -> Iterator[torch.Tensor]:
    """Per layer true minus base (K, V), both unrotated: fp32 ``[tokens, heads, 2 * dim]``."""
    for layer in range(skip_layers, len(group.layers)):
        found = []
        for side in (base, true):
            k, v = packing.read(group.pages, layer, side.slots)
            found.append(torch.cat((turn_keys(k, side.undo, group.pages.interleaved), v), dim=-1))
        yield found[1] - found[0]


def _lying(group: LayerGroup, slots: np.ndarray, start: int) -> Lying:
    device = group.pages.layers[0].device
    here = torch.from_numpy(slots).to(device)
    return Lying(here, group.rope.undo(start + torch.arange(len(here), device=device)))
