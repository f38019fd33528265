# SPDX-License-Identifier: Apache-2.0
"""Names of what is compared, e.g. ``seam16``, and the hints that ask for it."""

import re
from typing import Any

from kvcomm_vllm.cli.rows import DataError
from kvcomm_vllm.config import keys

DENSE: dict[str, Any] = {"mode": "off"}
CURVE = (1, 2, 5, 10)
_NAME = re.compile(r"off|rotate|paper|(seam|anchor)(\d*)")


def hints_of(name: str) -> dict[str, Any]:
    """Hints of a mode: ``off``, ``rotate``, ``paper``, ``seam``, ``anchor``, the latter two with a
    number of tokens or the configured ones.

    Raises:
        DataError: no such mode, or a number that the configuration would refuse.
    """
    found = _NAME.fullmatch(name)
    if not found:
        raise DataError(f"{name!r} is no mode; rotate, paper, seam16, anchor16 are, any number")
    mode, tokens = found.groups()
    if not mode:
        return {"mode": name}
    if not tokens:
        return {"mode": mode}
    key = keys()["seam_tokens"]
    if key.problem(int(tokens)) is not None:
        raise DataError(f"{name!r}: {int(tokens)} tokens are not allowed; allowed: {key.allowed}")
    return {"mode": mode, "seam_tokens": int(tokens)}


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
