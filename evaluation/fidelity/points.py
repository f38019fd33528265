# SPDX-License-Identifier: Apache-2.0
"""What is measured: modes, each with so many anchors."""

from __future__ import annotations

from typing import Any

from kvcomm_vllm.evaluation.modes import hints_of

CURVE = (1, 2, 5, 10)


def learns(hints: dict[str, Any]) -> bool:
    """Whether anchors make a difference to a mode."""
    return hints["mode"] in ("anchor", "paper")


def anchor_points(anchors: list[int], curve: bool) -> tuple[int, ...]:
    """Numbers of anchors to measure, ascending: none, those given, and for a curve some between."""
    most = max(anchors, default=0)
    between = [n for n in CURVE if n < most] if curve else []
    return tuple(sorted({0, *anchors, *between}))


def points(modes: list[str], anchors: tuple[int, ...]) -> list[tuple[str, int]]:
    """(mode, anchors) in the order they are measured; modes that do not learn have point 0 alone.

    Raises:
        DataError: see :func:`hints_of`.
    """
    return [(mode, n) for mode in modes for n in (anchors if learns(hints_of(mode)) else (0,))]
