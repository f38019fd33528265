# SPDX-License-Identifier: Apache-2.0
"""Our turn among several connectors, when vLLM asks all of them what they have for a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.state import RequestState

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Turns:
    """One connector alone loads for a request; what is remembered of it is to be true of that.

    Args:
        states: of the requests that are alive, by id.
        pages: holds what was planned.
    """

    def __init__(self, states: dict[str, RequestState], pages: SourcePages) -> None:
        self._states = states
        self._pages = pages

    def begin(self, request: Request, local: int) -> None:
        """Before anybody is asked: the request's hashes must show nothing of an attempt that came
        to nothing, for others look by them.
        """
        state = self._states.get(request.request_id)
        if state is None or state.loading:
            return
        state.supplied = False
        self.forget(state)
        if not state.is_private(local, self._pages.block_size):
            state.restore_exact()

    def forget(self, state: RequestState) -> None:
        """Let a plan go that was not admitted."""
        if state.plan is not None:
            state.plan = state.windows = None
            self._pages.release(state.id)

    def stand_back(self, request: Request, local: int) -> None:
        """One that is asked before us loads: nothing is planned."""
        state = self._states.get(request.request_id)
        if state is None:
            return
        state.local = local
        state.planned_placeholders, state.uses, state.lesson = [], [], None
        if state.off is None:
            state.decline(Reason.LOADED_ELSEWHERE)

    def supplied(self, request: Request, tokens: int) -> None:
        """So many tokens behind the local hit are loaded by another: they are what vLLM's prefix
        cache would have had, by the same names.
        """
        state = self._states.get(request.request_id)
        if state is not None:
            state.local += tokens
            state.supplied = True
