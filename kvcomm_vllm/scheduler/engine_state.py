# SPDX-License-Identifier: Apache-2.0
"""What an operator does to the engine, and vLLM tells no connector: it is looked at instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcomm_vllm.compat.pages import prefix_cache
from kvcomm_vllm.compat.scheduler import (
    drafted_slots,
    drafted_tokens,
    is_resting,
    weight_version,
)

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


class EngineState:
    """Whether the engine rests (paused, asleep, ending), and whether what was learned still holds.

    Args:
        scheduler, engine: vLLM's; what was not found is taken to be never paused and never changed.
    """

    def __init__(self, scheduler: Any | None = None, engine: Any | None = None) -> None:
        self.scheduler = scheduler
        self.engine = engine
        self._pool: BlockPool | None = None
        self._cache: Any | None = None
        self._weights: str | None = None

    def watch(self, pool: BlockPool) -> None:
        """From now on a reset of this pool counts as a renewal."""
        self._pool = pool
        self.renewed()

    @property
    def resting(self) -> bool:
        """Whether the engine is paused, asleep or about to end: it is to do nothing of its own."""
        return is_resting(self.scheduler, self.engine)

    @property
    def drafted_tokens(self) -> int:
        """Most tokens that vLLM guesses ahead for a request in one step."""
        return drafted_tokens(self.scheduler)

    @property
    def drafted_slots(self) -> int:
        """Slots behind those of a step's tokens that vLLM asks for, too, where it guesses."""
        return drafted_slots(self.scheduler)

    def renewed(self) -> bool:
        """Whether the prefix cache was emptied, or the weights were given another version, since
        this was last asked.
        """
        cache = None if self._pool is None else prefix_cache(self._pool)
        weights = weight_version(self.engine)
        same = cache is self._cache and weights == self._weights
        self._cache, self._weights = cache, weights
        return not same
