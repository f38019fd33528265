# SPDX-License-Identifier: Apache-2.0
"""The one question on which the data path of a device parts from that of the CPU."""

from __future__ import annotations

import torch


def accelerated(device: torch.device) -> bool:
    """Whether memory of this device is its own, and Triton's kernels work on it."""
    return device.type != "cpu"
