# SPDX-License-Identifier: Apache-2.0
"""Keys of the previous version whose place is another one now. They are read in this version, with
one warning, and unknown in the next.
"""

from __future__ import annotations

from collections.abc import Iterable

MOVED = {
    "max_slots": "max_placeholders",
    "head_tokens": "estimator.head_tokens",
    "mean_prior": "estimator.mean_prior",
    "ridge": "estimator.ridge",
    "ridge_tokens": "estimator.ridge_tokens",
    "map_inputs": "estimator.map_inputs",
    "map_rank": "estimator.map_rank",
    "paper_memory_mb": "paper.memory_mb",
    "paper_anchors": "paper.anchors",
    "paper_gamma": "paper.gamma",
    "paper_window": "paper.window",
    "paper_top_p": "paper.top_p",
    "paper_temperature": "paper.temperature",
    "paper_quirks": "paper.quirks",
}


def moved_warning(old: Iterable[str]) -> str:
    """Where keys that were given by their old names belong, in one sentence."""
    places = ", ".join(f"{name} is {MOVED[name]}" for name in old)
    return (
        f"old names of keys, which the next version will not know: {places} now (a name with a "
        "point stands below its first part, as in docs/config.md)"
    )
