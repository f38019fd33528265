# SPDX-License-Identifier: Apache-2.0
"""The paper's estimator (section 3.4, Eq. 6 and 7): deviations of anchors, weighted by similarity.

Two steps, so that tensor-parallel ranks can report what they see: sums of differences over a rank's
own heads (``distance_sums`` here, ``kernels.distance`` on pages), then weights from sums over all.
The weights are values of their own: the paper's code computes them for the first consumer of a
message in a request and uses them for all others as well.

Everything holds in the frame K is given in. Spans and arenas are ``[tokens, layers, kv_heads,
head_dim]``, K unrotated in this plugin; all sums are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch

from kvcomm_vllm.kernels.deviation import AnchorSum, DistanceSums


@dataclass(frozen=True)
class PaperWeights:
    """Weights over A covering anchors; they add up to 1 over the anchors.

    Args:
        token_k, token_v: fp32 ``[anchors, tokens]``, for the placeholder.
        channel_k, channel_v: fp32 ``[anchors, layers - skip_layers, kv_heads, head_dim]``, for the
            text behind it, the same for all its tokens; None if the sums had no channels. Zero
            behind an empty placeholder, which tells nothing about it.
        skip_layers: leading layers without deviation, 1 where layer 0 is among them.
    """

    token_k: torch.Tensor
    token_v: torch.Tensor
    channel_k: torch.Tensor | None
    channel_v: torch.Tensor | None
    skip_layers: int

    def placeholder(self, dk: torch.Tensor, dv: torch.Tensor, rows: torch.Tensor) -> AnchorSum:
        """Deviation of the placeholder (Eq. 6).

        Args:
            dk, dv: arenas of one consumer's deviations ``[arena_rows, layers - skip_layers,
                kv_heads, head_dim]``.
            rows: int64 ``[anchors, tokens]``, rows of each anchor's first tokens.
        """
        return AnchorSum(dk, dv, rows, self.token_k, self.token_v, self.skip_layers)

    def following(self, dk: torch.Tensor, dv: torch.Tensor, rows: torch.Tensor) -> AnchorSum:
        """Deviation of the text behind it (Eq. 7); ``rows`` is int64 ``[anchors, its tokens]``.

        Raises:
            ValueError: if the sums had no channels.
        """
        if self.channel_k is None or self.channel_v is None:
            raise ValueError("weights of the following text need distances per channel")
        return AnchorSum(dk, dv, rows, self.channel_k, self.channel_v, self.skip_layers)


def anchor_rows(
    starts: SequenceOf[int], lengths: SequenceOf[int], tokens: int, *, last: bool = False
) -> torch.Tensor:
    """Arena rows of each anchor's first (or last) ``tokens`` tokens, int64 ``[anchors, tokens]``.

    First rows are for the placeholder, its gate and its deviations; last rows for the distances
    that weigh the text behind it.

    Args:
        starts, lengths: place of each covering anchor in the arena.

    Raises:
        ValueError: if an anchor is shorter than ``tokens``.
    """
    if any(length < tokens for length in lengths):
        raise ValueError(f"an anchor of {min(lengths)} tokens does not cover {tokens}")
    begin = [s + (n - tokens) * last for s, n in zip(starts, lengths, strict=True)]
    return torch.tensor(begin, dtype=torch.int64)[:, None] + torch.arange(tokens)


def distance_sums(
    k: torch.Tensor,
    v: torch.Tensor,
    anchor_k: torch.Tensor,
    anchor_v: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor | None = None,
) -> DistanceSums:
    """Sums of differences between a placeholder and its covering anchors, all layers included.

    Args:
        k, v: its base KV ``[tokens, layers, kv_heads, head_dim]``.
        anchor_k, anchor_v: arenas of the anchors' base KV.
        first, last: rows each token is compared with, see :func:`anchor_rows`; without ``last``
            there are no sums per channel. With the kernel these are two calls.
    """
    k, v = k.float(), v.float()

    def differences(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return k - anchor_k[rows].float(), v - anchor_v[rows].float()

    anchors, tokens = first.shape
    square_v = k.new_zeros(anchors)
    abs_k, abs_v = k.new_zeros(2, anchors, tokens)
    for a in range(anchors):  # one by one: an anchor may be as large as the span's whole cache
        diff_k, diff_v = differences(first[a])
        square_v[a] = diff_v.square().sum()
        abs_k[a], abs_v[a] = diff_k.abs().sum((1, 2, 3)), diff_v.abs().sum((1, 2, 3))
    if last is None:
        return DistanceSums(square_v, abs_k, abs_v)
    channel_k, channel_v = k.new_zeros(2, anchors, *k.shape[1:])
    for a in range(anchors):
        diff_k, diff_v = differences(last[a])
        channel_k[a], channel_v[a] = diff_k.square().sum(0), diff_v.square().sum(0)
    return DistanceSums(square_v, abs_k, abs_v, channel_k, channel_v)


def add_sums(own: DistanceSums, others: SequenceOf[DistanceSums]) -> DistanceSums:
    """``own`` with what other ranks or layer groups saw added to its sums over heads.

    Sums per channel are for the heads and layers that one has itself, so they stay as they are.
    """
    return replace(
        own,
        square_v=sum((o.square_v for o in others), own.square_v),
        abs_k=sum((o.abs_k for o in others), own.abs_k),
        abs_v=sum((o.abs_v for o in others), own.abs_v),
    )


def gate_distances(sums: DistanceSums) -> list[float]:
    """One distance per anchor for the gate: ``|V - V_a|`` over everything (Eq. 5)."""
    return [float(d) for d in sums.square_v.sqrt()]


def token_distances(absolute: torch.Tensor, count: int) -> torch.Tensor:
    """Mean absolute difference per token ``[anchors, tokens]`` (Eq. 6; the paper's code takes the
    mean where its text has a norm); ``count`` = layers * kv_heads * head_dim over all ranks."""
    return absolute.float() / count


def channel_distances(square: torch.Tensor) -> torch.Tensor:
    """Norm over tokens per channel ``[anchors, layers, kv_heads, head_dim]`` (Eq. 7)."""
    return square.float().sqrt()


def softmax_weights(distances: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """``softmax(-distance / temperature)`` over the anchors, the first axis.

    Raises:
        ValueError: if the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    return torch.softmax(-distances / temperature, dim=0)


def weights(
    sums: DistanceSums, count: int, temperature: float = 1.0, skip_layers: int = 1
) -> PaperWeights:
    """Weights from sums over all heads, in the shape that kernels consume.

    Args:
        sums: of covering anchors only: a token without an anchor's row has distance 0 to it.
        count: layers * kv_heads * head_dim over all ranks and groups, the elements in
            ``abs_k[a, t]``; layers that are skipped count in every distance.
        skip_layers: leading layers of the sums that get no weights.
    """
    token_k, token_v = (
        softmax_weights(token_distances(s, count), temperature) for s in (sums.abs_k, sums.abs_v)
    )
    tokens = token_k.shape[1]

    def channels(square: torch.Tensor | None) -> torch.Tensor | None:
        if square is None:
            return None
        weight = softmax_weights(channel_distances(square[:, skip_layers:]), temperature)
        return weight if tokens else torch.zeros_like(weight)

    return PaperWeights(
        token_k,
        token_v,
        channels(sums.square_channel_k),
        channels(sums.square_channel_v),
        skip_layers,
    )


def blend(k: torch.Tensor, v: torch.Tensor, change: AnchorSum) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V ``[tokens, layers, kv_heads, head_dim]`` with the weighted deviations added.

    Rounded once to their dtype; skipped layers are returned as they are. What kernels do on pages.
    """

    def corrected(x: torch.Tensor, arena: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        total = x[:, change.skip_layers :].float()
        for rows, w in zip(change.rows, weight, strict=True):
            covered = (rows >= 0)[:, None, None, None]
            each = w if change.per_channel else w[:, None, None, None]
            total = total + each * arena[rows.clamp(min=0)].float() * covered
        return torch.cat((x[:, : change.skip_layers], total.to(x.dtype)), dim=1)

    return corrected(k, change.dk, change.wk), corrected(v, change.dv, change.wv)


def following_segments(spans: SequenceOf[tuple[int, int]], total: int) -> list[tuple[int, int]]:
    """The text behind each placeholder ``[start, end)``, up to the next one or the prompt's end.

    Raises:
        ValueError: if placeholders are out of order or outside the prompt.
    """
    edges = [edge for span in spans for edge in span]
    if edges != sorted(edges) or any(edge < 0 or edge > total for edge in edges):
        raise ValueError(f"spans {list(spans)} are not in order in {total} tokens")
    ends = [*edges[2::2], total]
    return list(zip(edges[1::2], ends, strict=False))  # without placeholders the one end is left
