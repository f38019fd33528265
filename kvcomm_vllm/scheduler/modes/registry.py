# SPDX-License-Identifier: Apache-2.0
"""All modes by the names that configurations and hints have for them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listing

from kvcomm_vllm.messages import ProbeOp, WorkerFacts
from kvcomm_vllm.scheduler.modes.anchor import AnchorMode
from kvcomm_vllm.scheduler.modes.base import Mode, Parts
from kvcomm_vllm.scheduler.modes.paper.mode import PaperMode
from kvcomm_vllm.scheduler.modes.plain import PlainMode
from kvcomm_vllm.scheduler.spans import Plan
from kvcomm_vllm.scheduler.state import RequestState

MODES: dict[str, Callable[[Parts], Mode]] = {
    "rotate": PlainMode,
    "seam": PlainMode,
    "anchor": AnchorMode,
    "paper": PaperMode,
}


class Modes:
    """One of each, for one engine, and what is said to all of them."""

    def __init__(self, parts: Parts) -> None:
        self._by_name = {name: make(parts) for name, make in MODES.items()}

    def __getitem__(self, name: str) -> Mode:
        return self._by_name[name]

    def set_capacity(self, facts: Listing[WorkerFacts]) -> None:
        for mode in self._by_name.values():
            mode.set_capacity(facts)

    def admitted(self, state: RequestState, plan: Plan | None) -> None:
        """Its mode hears of it; a request that is served exactly has none."""
        mode = self._by_name.get(state.mode)
        if mode is not None:
            mode.admitted(state, plan)

    def take_probes(self) -> list[ProbeOp]:
        return [probe for mode in self._by_name.values() for probe in mode.take_probes()]

    def on_distances(
        self, request_id: str, state: RequestState | None, found: list[list[float]] | None
    ) -> None:
        for mode in self._by_name.values():
            mode.on_distances(request_id, state, found)

    def counts(self) -> tuple[int, int]:
        """(placeholders, anchors) held by all of them."""
        counts = [mode.counts() for mode in self._by_name.values()]
        return sum(count[0] for count in counts), sum(count[1] for count in counts)

    def clear(self) -> None:
        for mode in self._by_name.values():
            mode.clear()
