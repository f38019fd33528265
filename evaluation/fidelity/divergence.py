# SPDX-License-Identifier: Apache-2.0
"""How far two lists of distributions over the same tokens are apart."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch

CLEAR = math.log(2)


@dataclass(frozen=True)
class Divergence:
    """Distance of a mode to dense on one prompt, along the dense greedy answer.

    Args:
        kl1: KL(dense || mode) at the first token, nats.
        kl_mean: the same, mean over all tokens.
        top1: share of tokens at which the mode's first token is dense's first, or tied with it
            (logits in bf16 often are).
        clear: the same, of the tokens at which dense's first is twice as likely as its second;
            None without any.
        prefix: share of leading tokens for which that holds without a break. It is what a greedy
            answer of the mode has in common with the dense one: up to the first difference both
            have been given the same tokens.
    """

    kl1: float
    kl_mean: float
    top1: float
    clear: float | None
    prefix: float


def divergence(dense: list[torch.Tensor], other: list[torch.Tensor]) -> Divergence:
    """Compare the distributions of two answers, step by step.

    Args:
        dense, other: log-probabilities per step, ``[vocabulary]`` each.

    Raises:
        ValueError: different numbers of steps, or none.
    """
    if not dense:
        raise ValueError("no tokens to compare")
    # rounding leaves equal distributions a little on either side of zero
    kl = [max(0.0, _kl(p, q)) for p, q in zip(dense, other, strict=True)]
    same = [bool(p[q.argmax()] == p.max()) for p, q in zip(dense, other, strict=True)]
    clear = [is_same for p, is_same in zip(dense, same, strict=True) if _margin(p) >= CLEAR]
    return Divergence(
        kl1=kl[0],
        kl_mean=statistics.fmean(kl),
        top1=statistics.fmean(same),
        clear=statistics.fmean(clear) if clear else None,
        prefix=(same.index(False) if False in same else len(same)) / len(same),
    )


def _margin(p: torch.Tensor) -> float:
    first, second = p.topk(2).values.tolist()
    return float(first - second)


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    # a token that dense rules out (-inf) adds nothing, where 0 * inf would be NaN
    return float(torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum())
