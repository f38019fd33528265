# SPDX-License-Identifier: Apache-2.0
"""vLLM's count of what its connector has supplied, put right: it takes all of a plan for hits, and
what a load was to bring also where that fails.
"""

from __future__ import annotations

from kvcomm_vllm.scheduler.spans import Plan
from kvcomm_vllm.scheduler.state import RequestState


class ComputedHits:
    """Attributes:
    tokens: that vLLM counts as hits though they are computed, until somebody takes them from its
        count.
    """

    def __init__(self) -> None:
        self.tokens = 0

    def admitted(self, state: RequestState, plan: Plan) -> None:
        state.hits = 0
        if not state.request.num_preemptions:  # vLLM counts those apart
            self.tokens += plan.hole_tokens
            state.hits = plan.reused_tokens

    def not_loaded(self, state: RequestState | None) -> None:
        """Nothing of its plan was."""
        if state is not None:
            self.tokens += state.hits
            state.hits = 0
