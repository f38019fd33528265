# SPDX-License-Identifier: Apache-2.0
"""Requests that begin anew when an operator resets what runs."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.v1.request import RequestStatus

from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.spread import SpreadPlans
from kvcomm_vllm.scheduler.state import RequestState


def set_back(
    states: Iterable[RequestState], spread: SpreadPlans, pages: SourcePages
) -> list[RequestState]:
    """Those that may have pages though vLLM does not run them: they waited for their pieces, of
    which none is on its way. They are as if never admitted.
    """
    found = []
    for state in states:
        if state.request.status == RequestStatus.RUNNING:
            continue  # vLLM sets it back itself
        if state.supplied and state.request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            continue  # another connector writes to its pages
        ended = (state.awaited and not state.loading) or state.failed
        if spread.drop(state.id) or ended:
            pages.release(state.id)
            state.loading = state.awaited = state.admitted = False
            state.windows = None
            found.append(state)
    return found
