# SPDX-License-Identifier: Apache-2.0
"""The keys below ``estimator``."""

from __future__ import annotations

from dataclasses import dataclass

from kvcomm_vllm.config.key import MOST, key


@dataclass(frozen=True)
class EstimatorConfig:
    """Constants of what predicts deviations from anchors (mode anchor)."""

    head_tokens: int = key(
        8,
        "Leading tokens of a placeholder whose mean deviation is kept one by one (the estimator's "
        "M).",
        low=0,
        high=4096,
    )
    mean_prior: float = key(
        1.0,
        "Anchors' worth by which each of these means is drawn to the mean over all tokens.",
        low=0.01,
        high=1000.0,
    )
    ridge: float = key(
        0.5,
        "Penalty on the map from base KV to deviation, per token seen; inputs are standardised.",
        low=0.01,
        high=1000.0,
    )
    ridge_tokens: int = key(
        2000,
        "Tokens counted for that penalty beside those seen: few anchors correct little.",
        low=0,
        high=MOST,
    )
    map_inputs: int = key(
        640,
        "Numbers by which that map is told of a token, of its base KV in a few layers; a "
        "placeholder's memory grows with them.",
        low=16,
        high=8192,
    )
    map_rank: int = key(
        32,
        "Numbers per layer the map makes of them, a token's code: few lose little and load faster.",
        low=1,
        high=512,
    )
