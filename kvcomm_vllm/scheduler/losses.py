# SPDX-License-Identifier: Apache-2.0
"""Losses: what was to be loaded and was not, as far as requests' reports speak of it."""

from __future__ import annotations

from kvcomm_vllm.messages import StepReport
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.computed_hits import ComputedHits
from kvcomm_vllm.scheduler.state import RequestState


def note_losses(report: StepReport, states: dict[str, RequestState], hits: ComputedHits) -> None:
    """Tell the requests of a step what was not loaded for them; vLLM ends those whose KV is not
    there at all, where it cannot compute it.
    """
    for request_id in report.failed & states.keys():
        states[request_id].decline(Reason.LOAD_FAILED)
    for request_id in report.repaired & states.keys():
        state = states[request_id]
        state.computed_instead()
        hits.not_loaded(state)
