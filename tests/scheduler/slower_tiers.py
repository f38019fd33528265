# SPDX-License-Identifier: Apache-2.0
"""Time for what lies behind the host pool."""

from __future__ import annotations

from engine_without_worker import EngineWithoutWorker

from kvcomm_vllm.compat.offload import end_of_step


def settle(engine: EngineWithoutWorker) -> None:
    """Let what was given to slower tiers, or asked of them, be there, and be seen."""
    engine.idle()
    manager = engine.half.tiers._manager
    end_of_step(manager)
    for tier in manager.secondary_tiers:
        tier.drain_jobs()
    end_of_step(manager)
