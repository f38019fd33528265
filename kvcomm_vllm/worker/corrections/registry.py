# SPDX-License-Identifier: Apache-2.0
"""All corrections, by the modes that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvcomm_vllm.compat.device import free_memory
from kvcomm_vllm.worker.corrections.anchor import Anchors
from kvcomm_vllm.worker.corrections.base import Correction, Ground
from kvcomm_vllm.worker.corrections.paper import PaperArena

CORRECTIONS: dict[str, Callable[[Ground], Correction]] = {
    "anchor": Anchors,
    "paper": PaperArena,
}


# What stays free: vLLM captures its CUDA graphs afterwards, and a step needs room to work.
SPARE_BYTES = 2**30


def reserve(ground: Ground) -> tuple[dict[str, Correction], str]:
    """One of each, and what the start line says of them. None takes the last ``SPARE_BYTES`` of a
    GPU; where there is no memory, placeholders stay cold.
    """
    config = ground.config
    try:
        made = {name: make(_limited(ground)) for name, make in CORRECTIONS.items()}
    except (RuntimeError, MemoryError):
        poor = replace(ground, limit=0)
        wanted = config.anchor_memory_mb + config.paper.memory_mb
        made = {name: make(poor) for name, make in CORRECTIONS.items()}
        return made, f"; NO ANCHORS: there are no {wanted} MB for them"
    return made, "".join(one.describe() for one in made.values())


def _limited(ground: Ground) -> Ground:
    """By what is free now: vLLM has taken its own, and each correction takes some."""
    free = free_memory(ground.groups[0].pages.layers[0].device)
    return ground if free is None else replace(ground, limit=max(0, free - SPARE_BYTES))
