# SPDX-License-Identifier: Apache-2.0
"""The keys below ``tiers``."""

from __future__ import annotations

from dataclasses import dataclass

from kvcomm_vllm.config.key import key


@dataclass(frozen=True)
class TiersConfig:
    """Where KV goes on lying when the engine's own pages are given to others."""

    host_gb: float = key(
        0.0,
        "Host memory for pages of requests that have ended, of all ranks of an engine, taken at "
        "start; what has left the KV cache is brought back from there when a prompt needs it.",
        low=0.0,
        high=65536.0,
        when_zero="none: what is reused must still lie in the KV cache",
    )
    wait_seconds: float = key(
        5.0,
        "Longest time a request waits for pages that are being brought back; then they are "
        "computed.",
        low=0.0,
        high=600.0,
    )

    @property
    def wanted(self) -> bool:
        return self.host_gb > 0
