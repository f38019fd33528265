# SPDX-License-Identifier: Apache-2.0
"""Names of what is compared, e.g. ``seam16``, and the hints that ask for it."""

from __future__ import annotations

import re
from typing import Any

from kvcomm_vllm.config import keys
from kvcomm_vllm.evaluation.workloads.rows import DataError

DENSE: dict[str, Any] = {"mode": "off"}
UNREFRESHED = "-raw"  # behind a mode, in an engine with max_refresh_share 0
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


def asked(name: str) -> dict[str, Any]:
    """Hints of a mode whose name may also say how the engine is configured.

    Raises:
        DataError: see :func:`hints_of`.
    """
    return hints_of(name.removesuffix(UNREFRESHED))
