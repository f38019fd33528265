# SPDX-License-Identifier: Apache-2.0
"""The one way the worker half says that it does not understand what it sees."""

from __future__ import annotations

from kvcomm_vllm.reasons import Reason


class Unsupported(Exception):
    """Reuse is off for this engine; ``detail`` names what was found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail
