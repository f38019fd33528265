# SPDX-License-Identifier: Apache-2.0
"""The paper's estimator written out over whole spans, which golden vectors judge and which judges
what workers do on pages.

Spans and arenas are ``[tokens, layers, kv_heads, head_dim]``, K in the frame it is given in.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from kvcomm_vllm.worker.corrections import paper_formulas as paper

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sums:
    """Over differences between a message and A anchors, for K and for V.

    Args:
        square_v: ``[anchors]``, over everything.
        token: ``[anchors, tokens]`` each, absolute differences to the anchors' first tokens.
        channel: ``[anchors, layers, kv_heads, head_dim]`` each, squares to their last tokens.
    """

    square_v: torch.Tensor
    token: Pair
    channel: Pair


@dataclass(frozen=True)
class Weights:
    """Over the anchors, where they add up to 1; shapes as the sums, without skipped layers."""

    token: Pair
    channel: Pair


def anchor_rows(
    starts: SequenceOf[int], lengths: SequenceOf[int], tokens: int, *, last: bool = False
) -> torch.Tensor:
    """Arena rows of each anchor's first (or last) tokens: int64 ``[anchors, tokens]``."""
    begin = [s + (n - tokens) * last for s, n in zip(starts, lengths, strict=True)]
    return torch.tensor(begin, dtype=torch.int64)[:, None] + torch.arange(tokens)


def distance_sums(message: Pair, arenas: Pair, first: torch.Tensor, last: torch.Tensor) -> Sums:
    """``first`` and ``last`` are the rows each token is compared with, see :func:`anchor_rows`."""

    def differences(rows: torch.Tensor) -> Pair:
        k, v = (x.float() - arena[rows].float() for x, arena in zip(message, arenas, strict=True))
        return k, v

    near_k, near_v = differences(first)
    far_k, far_v = differences(last)
    return Sums(
        near_v.square().sum((1, 2, 3, 4)),
        (near_k.abs().sum((2, 3, 4)), near_v.abs().sum((2, 3, 4))),
        (far_k.square().sum(1), far_v.square().sum(1)),
    )


def weights(sums: Sums, count: int, temperature: float = 1.0, skip_layers: int = 1) -> Weights:
    """``count`` = layers * kv_heads * head_dim; skipped layers count in every distance. Behind an
    empty message, which tells nothing about it, weights are zero.
    """

    def by_token(absolute: torch.Tensor) -> torch.Tensor:
        return paper.softmax_weights(paper.token_distances(absolute, count), temperature)

    def by_channel(square: torch.Tensor) -> torch.Tensor:
        distances = paper.channel_distances(square[:, skip_layers:])
        return paper.softmax_weights(distances, temperature) * bool(sums.token[0].shape[1])

    (token_k, token_v), (channel_k, channel_v) = sums.token, sums.channel
    return Weights(
        (by_token(token_k), by_token(token_v)), (by_channel(channel_k), by_channel(channel_v))
    )


def corrected(base: Pair, changes: Pair, rows: torch.Tensor, weight: Pair) -> Pair:
    """Base KV with the weighted changes in ``rows`` ``[anchors, tokens]`` added, rounded once.

    Args:
        changes: arenas without the layers that are skipped, which are returned as they are.
        weight: by token or by channel.
    """

    def blend(x: torch.Tensor, arena: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        w = w[:, :, None, None, None] if w.ndim == 2 else w[:, None]
        skip = x.shape[1] - arena.shape[1]
        total = x[:, skip:].float() + (w * arena[rows].float()).sum(0)
        return torch.cat((x[:, :skip], total.to(x.dtype)), dim=1)

    return blend(base[0], changes[0], weight[0]), blend(base[1], changes[1], weight[1])
