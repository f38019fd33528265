# SPDX-License-Identifier: Apache-2.0
"""What a driver may be given to look at its server with, between two requests.

The driver knows nothing of how a server works; a meter may.
"""

from __future__ import annotations

from typing import Any, Protocol

from kvcomm_vllm.cli.treatment import TreatmentMeter


class Meter(Protocol):
    def settle(self) -> bool:
        """Wait until the server has done what it does after an answer; False if it takes too long,
        and what comes then depends on time.
        """

    def take(self, prompt_tokens: int) -> dict[str, Any]:
        """Fields of the record of the request that has just ended."""


class KVCommMeter:
    """Tokens by treatment, from the counters of a server with the plugin.

    All columns of a server share one, as they share its counters.
    """

    def __init__(self, base_url: str) -> None:
        self._meter = TreatmentMeter(base_url)

    def settle(self) -> bool:
        return self._meter.settle()

    def take(self, prompt_tokens: int) -> dict[str, Any]:
        found = self._meter.take(prompt_tokens)
        if found is None:
            return {}
        return {
            "local": found.local,
            "reused": found.reused,
            "computed": found.computed,
            "corrected": found.corrected,
            "declined": dict(found.declined),
        }
