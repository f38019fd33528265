# SPDX-License-Identifier: Apache-2.0
"""Start-up check of the model itself: do its keys turn with the position as its rotary embedding
says?

A token alone in its sequence attends to nothing but itself, so what reaches a layer does not depend
on its position. The same token at two positions must give equal values, and keys that differ by the
rotation between the positions, in every layer. What only reading the model's code would tell shows
here: layers that do not use the embedding they have (Cohere 2, EXAONE 4), norms with weights behind
the rotation, positions inside the token embeddings.
"""

from __future__ import annotations

import torch

from kvcomm_vllm.kernels import packing
from kvcomm_vllm.messages import HoleOp
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.self_check import TOLERANCE
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.load import LoadKernel, TokenMoves, run_loads
from kvcomm_vllm.worker.side_forward import Row, SideForward

OLD = 3


def check_pages(number: int = 0) -> tuple[int, int]:
    """Two pages that nobody uses yet, in one of vLLM's KV cache groups: layers of different groups
    may share memory.
    """
    return 2 * number + 1, 2 * number + 2


def tables_of(groups: list[LayerGroup], *order: int) -> dict[int, list[int]]:
    """By KV cache group the block table of its check pages in this order."""
    return {g.number: [check_pages(g.number)[i] for i in order] for g in groups}


def unrotated_layers(
    groups: list[LayerGroup], block_size: int, kernel: LoadKernel, side_forward: SideForward
) -> frozenset[str]:
    """Names of layers that have a rotary embedding and do not use it.

    Under tensor parallelism every rank must come here, or none: the forward has collectives.

    Raises:
        Unsupported: a layer's keys turn in another way, or its values change with the position.
    """
    new = OLD + 2 * block_size + 1
    token = side_forward.runner.model_config.get_vocab_size() // 2
    rows = [
        Row([check_pages()[i]], HoleOp(0, [token]), shift, windowed=tables_of(groups, i))
        for i, shift in enumerate((OLD, new))
    ]
    side_forward.run(rows, eager=True)
    return frozenset().union(*(_unrotated(group, block_size, kernel, new) for group in groups))


def _unrotated(group: LayerGroup, block_size: int, kernel: LoadKernel, new: int) -> set[str]:
    device = group.pages.layers[0].device
    # the token at both positions, and what a load makes of the first
    one, two = (page * block_size for page in check_pages(group.number))
    slots = torch.tensor([one, two, one + 1]).to(device)
    positions = torch.tensor([OLD, new]).to(device)
    run_loads([group], TokenMoves(slots[:1], slots[2:], positions[:1], positions[1:]), kernel)
    found = set()
    for index, layer in enumerate(group.layers):
        keys, values = packing.read(group.pages, index, slots)
        tolerance = TOLERANCE[group.pages.layers[index].element_size()]
        if not _equal(values[0], values[1], tolerance):
            raise Unsupported(
                Reason.SELF_CHECK_FAILED, f"{layer.layer_name}: values depend on the position"
            )
        if not _equal(keys[2], keys[1], tolerance):
            if not _equal(keys[0], keys[1], tolerance):
                detail = f"{layer.layer_name}: keys do not turn as the rotary embedding says"
                raise Unsupported(Reason.SELF_CHECK_FAILED, detail)
            found.add(str(layer.layer_name))
        packing.clear(group.pages, index, slots)
    return found


def _equal(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    return float((got - want).norm()) <= tolerance * float(want.norm())
