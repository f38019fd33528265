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
from kvcomm_vllm.worker.upload import upload


@dataclass(frozen=True)
class Lying:
    """Where tokens lie: their slots, int64 ``[tokens]``, and what takes the rotation off their
    keys.
    """

    slots: torch.Tensor
    undo: Rotation


def base_of(group: LayerGroup, parts: list[LoadOp], block_size: int) -> Lying:
    """Where a text's base KV lies, part by part."""
    slots = [
        slots_of(part.source_blocks, part.source_offset, part.length, block_size) for part in parts
    ]
    starts = [part.source_start for part in parts]
    return _lying(group, slots, starts)


def true_of(group: LayerGroup, parts: list[LoadOp], block_ids: list[int], block_size: int) -> Lying:
    """Where its true KV lies, in the lesson's pages ``block_ids``."""
    slots = [slots_of(block_ids, part.prompt_start, part.length, block_size) for part in parts]
    return _lying(group, slots, [part.prompt_start for part in parts])


def deviations(
    group: LayerGroup, base: Lying, true: Lying, skip_layers: int = 0
) -> Iterator[torch.Tensor]:
    """Per layer true minus base (K, V), both unrotated: fp32 ``[tokens, heads, row_dim]``."""
    for layer in range(skip_layers, len(group.layers)):
        found = []
        for side in (base, true):
            k, v = packing.read(group.pages, layer, side.slots)
            found.append(torch.cat((turn_keys(k, side.undo, group.pages.interleaved), v), dim=-1))
        yield found[1] - found[0]


def _lying(group: LayerGroup, slots: list[np.ndarray], starts: list[int]) -> Lying:
    pairs = zip(starts, slots, strict=True)
    positions = [np.arange(start, start + len(part), dtype=np.int64) for start, part in pairs]
    here, at = upload(
        [np.concatenate(slots), np.concatenate(positions)], group.pages.layers[0].device
    )
    return Lying(here, group.rope.undo(at))
