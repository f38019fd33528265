# SPDX-License-Identifier: Apache-2.0
"""Requests that begin anew: an operator resets what runs, or pages were lost."""

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


def set_back_to_losses(states: Iterable[RequestState], lost: set[int], block_size: int) -> None:
    """Each request that runs on lost pages computes them itself.

    vLLM (0.28 - 0.33) has the first of them compute what they share and lets the others go on as if
    it had; it may be aborted before, or be slower. The pages have lost their names, and what is
    written twice is the same.
    """
    for state in states:
        request = state.request
        if request.status == RequestStatus.RUNNING:
            first = next((n for n, page in enumerate(state.block_ids) if page in lost), None)
            if first is not None:
                request.num_computed_tokens = min(request.num_computed_tokens, first * block_size)
