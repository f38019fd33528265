# SPDX-License-Identifier: Apache-2.0
"""For the report: how a prompt is served at its first admission."""

from __future__ import annotations

from kvcomm_vllm.compat.scheduler import count_cached_tokens
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.scheduler import near
from kvcomm_vllm.scheduler.index import SequenceIndex
from kvcomm_vllm.scheduler.modes.registry import Modes
from kvcomm_vllm.scheduler.spans import Plan
from kvcomm_vllm.scheduler.state import RequestState


def note_service(
    state: RequestState,
    plan: Plan | None,
    modes: Modes,
    config: KVCommConfig,
    index: SequenceIndex,
) -> None:
    """By this plan, if any, behind its local hit."""
    state.served, state.served_local = plan, state.local
    if state.is_private(state.local, index.block_size):
        assert state.first_approximate is not None
        state.served_approximate = state.local - state.first_approximate
    modes.admitted(state, plan)
    near.note(state, config, index)
    if plan is not None:
        state.declined.clear()
        state.placeholders = state.planned_placeholders
        count_cached_tokens(state.request, plan.local, plan.reused_tokens)
