# SPDX-License-Identifier: Apache-2.0
"""The one way the worker half says that it does not understand what it sees."""

from __future__ import annotations

from kvcomm_vllm.reasons import Reason


class Unsupported(Exception):  # noqa: N818 - names what was found, not a fault
    """Reuse is off for this engine; ``detail`` names what was found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail
