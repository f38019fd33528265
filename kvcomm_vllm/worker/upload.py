# SPDX-License-Identifier: Apache-2.0
"""Upload: everything a step tells the device goes there at once, and nothing waits for it.

A copy from memory that is not pinned, and one that does not say ``non_blocking``, makes the host
wait for all work the device has still to do, which under asynchronous scheduling is a whole step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvcomm_vllm.compat.device import send
from kvcomm_vllm.worker import accelerator

ALIGNED = 16  # bytes: kernels are compiled for addresses that are, and for others once more


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays on a device, in one transfer; on the CPU they share their memory instead."""
    if not accelerator.accelerated(device):
        return [torch.from_numpy(array) for array in arrays]
    sizes = [-(-array.nbytes // ALIGNED) * ALIGNED for array in arrays]
    ends = np.cumsum(sizes).tolist()
    # never empty: torch gives numpy's empty arrays a stride with which nothing can be viewed
    staged = np.empty(max(ends[-1], ALIGNED), dtype=np.uint8)
    for array, size, end in zip(arrays, sizes, ends, strict=True):
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        staged[end - size : end - size + array.nbytes] = flat
    there = send(torch.from_numpy(staged), device)
    return [
        there[end - size : end - size + array.nbytes]
        .view(torch.from_numpy(array).dtype)
        .view(array.shape)
        for array, size, end in zip(arrays, sizes, ends, strict=True)
    ]
