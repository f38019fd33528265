# SPDX-License-Identifier: Apache-2.0
"""Reports: what the responses of requests tell of how they were served."""

from __future__ import annotations

from typing import Any

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.hints import FIELD
from kvcomm_vllm.scheduler.state import RequestState
from kvcomm_vllm.scheduler.trace import NoTrace, Trace


class Reports:
    """Of each request one: with its first output, as vLLM's front end may answer before the engine
    hears of an end; and with the last one of a request that vLLM ended without asking (an error).

    Attributes:
        trace: hears of each request that has ended.
    """

    def __init__(self, config: KVCommConfig, block_size: int) -> None:
        self._detail = config.report
        self._block_size = block_size
        self._ended: dict[str, dict[str, Any] | None] = {}
        self.trace: Trace | NoTrace = NoTrace()

    def next_step(self) -> None:
        self._ended.clear()

    def ended(self, state: RequestState) -> dict[str, Any] | None:
        """The report of a request that ends in this step."""
        self.trace.ended(state)
        self._ended[state.id] = report = self._report(state)
        return report

    def tell(self, request_id: str, state: RequestState | None) -> dict[str, Any] | None:
        """What the output of a request that has no report brings along; ``state`` is None if it
        has ended.
        """
        if state is None:
            return self._ended.get(request_id)
        if state.told:
            return None
        state.told = True
        return self._report(state)

    def _report(self, state: RequestState) -> dict[str, Any] | None:
        """The ``kv_transfer_params`` of the response."""
        if self._detail == "off":
            return None
        full = state.trusted and self._detail != "coarse"
        return {FIELD: state.report() if full else state.coarse_report(self._block_size)}
