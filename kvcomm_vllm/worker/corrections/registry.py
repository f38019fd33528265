# SPDX-License-Identifier: Apache-2.0
"""All corrections, by the modes that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvcomm_vllm.worker.corrections.anchor import Anchors
from kvcomm_vllm.worker.corrections.base import Correction, Ground
from kvcomm_vllm.worker.corrections.paper import PaperArena

CORRECTIONS: dict[str, Callable[[Ground], Correction]] = {
    "anchor": Anchors,
    "paper": PaperArena,
}


def reserve(ground: Ground) -> tuple[dict[str, Correction], str]:
    """One of each, and what the start line says of them; where there is no memory, placeholders
    stay cold.
    """
    config = ground.config
    try:
        made = {name: make(ground) for name, make in CORRECTIONS.items()}
    except (RuntimeError, MemoryError):
        poor = replace(ground, memory=False)
        wanted = config.anchor_memory_mb + config.paper.memory_mb
        made = {name: make(poor) for name, make in CORRECTIONS.items()}
        return made, f"; NO ANCHORS: there are no {wanted} MB for them"
    return made, "".join(one.describe() for one in made.values())
