# SPDX-License-Identifier: Apache-2.0
"""The paper's gate (section 3.3, Eq. 5): may a message be corrected, or is it a new anchor?

It looks at how the candidate's similarity spreads over the anchors, so it notices ties and not
nearness: one anchor that is less far than all others lets a candidate pass, however far it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

MIN_ANCHORS = 2  # one anchor alone has no spread to judge by
EPSILON = 1e-40  # keeps 0 * log2(0) at 0


@dataclass(frozen=True)
class GateDecision:
    """What the gate says of one message.

    Attributes:
        new_anchor: compute it densely, it may become an anchor; False = it may be corrected.
        available: pool indices of the anchors that cover it.
        entropy_bits, limit_bits: both sides of Eq. 5; None where too few anchors cover it.
        activated: pool indices of the anchors that count as used, most similar first; empty for a
            new anchor.
    """

    new_anchor: bool
    available: tuple[int, ...] = ()
    entropy_bits: float | None = None
    limit_bits: float | None = None
    activated: tuple[int, ...] = ()


def covering_anchors(lengths: SequenceOf[int], tokens: int) -> list[int]:
    """Pool indices of the anchors at least as long as a message of ``tokens`` tokens."""
    return [i for i, length in enumerate(lengths) if length >= tokens]


def similarities(distances: SequenceOf[float] | np.ndarray) -> np.ndarray:
    """``softmax(-distance)`` at temperature 1, float64 ``[anchors]``."""
    negative = -np.asarray(distances, np.float64)
    with np.errstate(invalid="ignore"):  # overflowed distances end as NaN, which passes no gate
        weights = np.exp(negative - negative.max(initial=-np.inf))
        return np.asarray(weights / weights.sum())


def entropy_bits(similarity: np.ndarray) -> float:
    """Entropy of a distribution in bits; probabilities that underflowed to 0 add 0."""
    return float(0.0 - np.sum(similarity * np.log2(similarity + EPSILON)))


def decide(
    distances: SequenceOf[float] | np.ndarray,
    lengths: SequenceOf[int],
    tokens: int,
    *,
    gamma: float = 0.3,
    top_p: float = 0.9,
    paper_quirks: bool = False,
) -> GateDecision:
    """The gate, for one message against one pool.

    Args:
        distances: one per anchor of the pool, ``sqrt(sum (V - V_a)^2)`` over all layers, heads,
            tokens and channels, not divided by their number; those of anchors that do not cover
            the message are not looked at. NaN in the others makes a new anchor.
        lengths: tokens of the pool's anchors.
        tokens: tokens of the message.
        gamma: share of the highest possible entropy above which anchors are tied.
        top_p: similarity that activated anchors hold together.
        paper_quirks: as the paper's code: activated anchors hold less than ``top_p``, so the one
            that crosses it is left out, and where the first alone reaches it all are activated;
            lengths of another number than the pool's make a new anchor. Otherwise the fewest
            anchors that reach ``top_p`` are activated.

    Raises:
        ValueError: without quirks, if there is not one length per distance.
    """
    if len(lengths) != len(distances):
        if paper_quirks:
            return GateDecision(new_anchor=True)
        raise ValueError(f"{len(lengths)} lengths for {len(distances)} anchors")
    available = covering_anchors(lengths, tokens)
    if len(available) < MIN_ANCHORS:
        return GateDecision(new_anchor=True, available=tuple(available))
    near = np.asarray(distances, np.float64)[available]
    similarity = similarities(near)
    entropy, limit = entropy_bits(similarity), gamma * math.log2(len(available))
    shareable = entropy <= limit  # False for NaN
    activated = _activated(near, similarity, top_p, paper_quirks) if shareable else []
    return GateDecision(
        not shareable, tuple(available), entropy, limit, tuple(available[i] for i in activated)
    )


def _activated(
    distances: np.ndarray, similarity: np.ndarray, top_p: float, paper_quirks: bool
) -> list[int]:
    order = np.argsort(distances, kind="stable")  # which tell more apart than similarities do
    below = int(np.searchsorted(np.cumsum(similarity[order]), top_p, side="left"))
    kept = (below or len(order)) if paper_quirks else below + 1
    return [int(i) for i in order[:kept]]
