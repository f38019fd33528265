# SPDX-License-Identifier: Apache-2.0
"""The keys below ``paper``."""

from __future__ import annotations

from dataclasses import dataclass

from kvcomm_vllm.config.key import MOST, key


@dataclass(frozen=True)
class PaperConfig:
    """What mode paper keeps, and how it judges."""

    memory_mb: int = key(
        0,
        "Memory reserved at start for anchors of mode paper, beside vLLM's own.",
        low=0,
        high=MOST,
        when_zero="no request is served in mode paper",
    )
    anchors: int = key(
        20,
        "The paper's V (its code: max_anchor_num): anchors a placeholder may hold.",
        low=2,
        high=MOST,
    )
    gamma: float = key(
        0.3,
        "The paper's threshold gamma: share of the highest entropy up to which a message may be "
        "shared; 1 = always.",
        low=0.0,
        high=1.0,
    )
    window: int = key(
        5,
        "The paper's window_size: of how many oldest anchors the least used one goes.",
        low=1,
        high=MOST,
    )
    top_p: float = key(
        0.9,
        "Similarity that the anchors counted as used hold together.",
        low=0.0,
        high=1.0,
    )
    temperature: float = key(
        1.0,
        "Temperature of the weights of anchors; the paper has 1.",
        low=0.001,
        high=1000.0,
    )
    quirks: bool = key(
        False,
        "Count, evict and let pass exactly as the paper's code does, where that differs from its "
        "text.",
    )
