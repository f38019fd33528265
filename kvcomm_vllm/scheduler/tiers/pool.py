# SPDX-License-Identifier: Apache-2.0
"""The engine's tiers on vLLM's own: a host pool, into which slower ones are read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Listing
from typing import Any

from kvcomm_vllm.compat.offload import end_of_step, in_pool
from kvcomm_vllm.messages import StepReport, TransferOp
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.scheduler.engine_state import EngineState
from kvcomm_vllm.scheduler.index import Sequence
from kvcomm_vllm.scheduler.sources import SourceFinder
from kvcomm_vllm.scheduler.state import RequestState
from kvcomm_vllm.scheduler.tiers.returns import Returns
from kvcomm_vllm.scheduler.tiers.stores import Stores
from kvcomm_vllm.scheduler.tiers.wanted import Wanted


class HostPool:
    """Keeps pages of requests that have ended, and brings them back.

    Args:
        manager: vLLM's ``TieringOffloadingManager``.
        finder: knows the KV cache, and what requests need of it.
        ranks: workers, each of which copies its own part of every page.
    """

    def __init__(
        self,
        manager: Any,
        finder: SourceFinder,
        stats: KVCommStats,
        engine: EngineState,
        ranks: int,
    ) -> None:
        self._manager = manager
        self._stats = stats
        self._engine = engine
        self._ranks = ranks
        self._finder = finder
        self._stores = Stores(manager, finder.pages)
        self._returns = Returns(manager, finder.pages, finder.config.tiers.wait_seconds)
        self._numbers = itertools.count()
        self._ops: list[TransferOp] = []
        self._ranks_done: Counter[int] = Counter()  # of transfers under way
        self._failed: set[int] = set()
        self._void = False  # nothing that is kept may be read; until nothing is under way

    def keep(self, names: Listing[bytes], block_ids: Listing[int]) -> None:
        if self._void or self._engine.resting:
            return
        self._send(self._stores.begin(next(self._numbers), names, block_ids))

    def bring(self, state: RequestState, wanted: Iterable[Wanted]) -> bool:
        if self._returns.under_way(state.id):
            return True
        return not self._void and any(self._bring(state, one) for one in wanted)

    def _bring(self, state: RequestState, wanted: Wanted) -> bool:
        here, coming = self._returns.look(state.id, wanted)
        if coming or not here:
            return coming
        number, own = next(self._numbers), self._finder.own(state)
        return self._send(self._returns.begin(number, state.id, wanted, here, own))

    def _send(self, op: TransferOp | None) -> bool:
        if op is None:
            return False
        self._ops.append(op)
        self._ranks_done[op.number] = 0
        return True

    def settled(self, request_id: str) -> None:
        self._returns.settled(request_id)

    def forget(self, request_id: str) -> None:
        self._returns.forget(request_id)

    def holds(self, sequence: Sequence) -> bool:
        return any(in_pool(self._manager, name) for name in sequence.block_hashes)

    def take_ops(self) -> list[TransferOp]:
        end_of_step(self._manager)
        ops, self._ops = self._ops, []
        return ops

    def on_report(self, report: StepReport) -> None:
        self._failed |= report.untransferred
        for number, ranks in report.transferred.items():
            self._ranks_done[number] += ranks
            if self._ranks_done[number] >= self._ranks:
                self._over(number, number in self._failed)

    def _over(self, number: int, failed: bool) -> None:
        del self._ranks_done[number]
        self._failed.discard(number)
        failed = failed or self._void
        if not self._stores.over(number, failed):
            self._stats.count_returned(self._returns.over(number, failed))
        if self._void and not self._ranks_done:
            self._manager.reset_cache()
            self._void = False

    def due(self) -> bool:
        if self._engine.resting:
            for op in self._ops:  # whoever wants the engine to rest may want its pages, too
                self._over(op.number, failed=True)
            self._ops.clear()
            return False
        return bool(self._ranks_done) or self._manager.has_pending_work()

    def clear(self) -> None:
        self._void = True
        if not self._ranks_done:
            self._manager.reset_cache()
            self._void = False

    def close(self) -> None:
        self._manager.shutdown()
