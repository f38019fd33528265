# SPDX-License-Identifier: Apache-2.0
"""All modes by the names that configurations and hints have for them."""

from __future__ import annotations

from collections.abc import Callable

from kvcomm_vllm.scheduler.modes.anchor import AnchorMode
from kvcomm_vllm.scheduler.modes.base import Mode, Parts
from kvcomm_vllm.scheduler.modes.paper.mode import PaperMode
from kvcomm_vllm.scheduler.modes.plain import PlainMode

MODES: dict[str, Callable[[Parts], Mode]] = {
    "rotate": PlainMode,
    "seam": PlainMode,
    "anchor": AnchorMode,
    "paper": PaperMode,
}


def make_modes(parts: Parts) -> dict[str, Mode]:
    """One of each, for one engine."""
    return {name: make(parts) for name, make in MODES.items()}
