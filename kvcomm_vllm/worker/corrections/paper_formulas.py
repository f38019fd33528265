# SPDX-License-Identifier: Apache-2.0
"""The paper's weights (section 3.4, Eq. 6 and 7): anchors count by how near a message is to them.

Distances come from sums of differences of unrotated base KV: over layers, heads and channels for
the message itself (Eq. 6), over tokens for the text behind it (Eq. 7).
"""

from __future__ import annotations

import torch


def token_distances(absolute: torch.Tensor, count: int) -> torch.Tensor:
    """Mean absolute difference per token ``[anchors, tokens]`` (Eq. 6; the paper's code takes the
    mean where its text has a norm); ``count`` = layers * kv_heads * channels over all groups."""
    return absolute.float() / count


def channel_distances(square: torch.Tensor) -> torch.Tensor:
    """Norm over tokens per channel (Eq. 7), from sums of squares of any shape."""
    return square.float().sqrt()


def softmax_weights(distances: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """``softmax(-distance / temperature)`` over the anchors, the first axis.

    Raises:
        ValueError: if the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    return torch.softmax(-distances / temperature, dim=0)
