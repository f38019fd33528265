# SPDX-License-Identifier: Apache-2.0
"""The engine's tiers on vLLM's own: a host pool, into which slower ones are read."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Listing
from typing import Any

from vllm.logger import init_logger

from kvcomm_vllm.compat.offload import (
    drop_slower,
    end_of_step,
    in_pool,
    let_finish,
    take_counts,
)
from kvcomm_vllm.messages import StepMessage, StepReport, TransferOp
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.scheduler.engine_state import EngineState
from kvcomm_vllm.scheduler.index import Sequence
from kvcomm_vllm.scheduler.promoted import Promoted
from kvcomm_vllm.scheduler.sources import SourceFinder
from kvcomm_vllm.scheduler.state import RequestState
from kvcomm_vllm.scheduler.tiers.costs import Costs
from kvcomm_vllm.scheduler.tiers.events import TierEvents
from kvcomm_vllm.scheduler.tiers.manifests import Manifests
from kvcomm_vllm.scheduler.tiers.returns import Returns
from kvcomm_vllm.scheduler.tiers.stores import Stores
from kvcomm_vllm.scheduler.tiers.wanted import Wanted

logger = init_logger("vllm.kvcomm")
LAST_SECONDS = 3.0  # that an engine's end waits for slower tiers; vLLM waits 5 for the engine
NEWS_SECONDS = 1.0  # between two looks at what other engines have written down


class HostPool:
    """Keeps pages of requests that have ended, and brings them back.

    Not of those with a LoRA adapter: which weights it has is known to this engine's workers alone,
    and while they serve; numbers and paths are no more than names.

    Args:
        manager: vLLM's ``TieringOffloadingManager``.
        finder: knows the KV cache, and what requests need of it.
        ranks: workers, each of which copies its own part of every page.
        manifests: of what lies in slower tiers, if there are any; the last's tenants' digests are
            those of all.
        foreign: whether tiers lie behind it that know pages alone.
    """

    def __init__(
        self,
        manager: Any,
        finder: SourceFinder,
        stats: KVCommStats,
        engine: EngineState,
        ranks: int,
        manifests: Listing[Manifests] = (),
        foreign: bool = False,
    ) -> None:
        self._manifests = manifests
        self._slower = bool(manifests) or foreign
        self._looked_at = 0.0
        self._manager = manager
        self._stats = stats
        self._engine = engine
        self._ranks = ranks
        self._finder = finder
        self._costs = Costs(finder.block_size)
        wait_seconds = finder.config.tiers.wait_seconds
        self._returns = Returns(manager, finder.pages, wait_seconds, self._costs)
        finder.pages.events.remembers = True
        self._events = TierEvents([finder.pages.events.told, self._returns.exact])
        self._stores = Stores(manager, finder.pages, self._events)
        self._numbers = itertools.count()
        self._ops: list[TransferOp] = []
        self._awaited: list[int] = []
        self._ranks_done: Counter[int] = Counter()  # of transfers under way
        self._failed: set[int] = set()
        self._void = False  # nothing that is kept may be read; until nothing is under way

    @property
    def secret(self) -> bytes | None:
        return self._manifests[-1].secret if self._manifests else None

    def stored(self, sequence: Sequence, block_ids: Listing[int]) -> None:
        if sequence.adapter:
            return
        self.keep(sequence.block_hashes, block_ids)
        self.described(sequence)

    def described(self, sequence: Sequence) -> None:
        if not self._void and not sequence.adapter:
            for manifests in self._manifests:
                manifests.append(sequence)

    def news(self) -> None:
        now = time.monotonic()
        if not self._manifests or self._void or now - self._looked_at < NEWS_SECONDS:
            return
        self._looked_at = now
        index = self._finder.index
        for record in itertools.chain.from_iterable(one.news() for one in self._manifests):
            first = record.first_approximate
            sequence = index.add(
                namespace=record.namespace,
                tokens=record.token_ids(),
                block_hashes=record.names,
                num_prompt_tokens=record.prompt,
                first_approximate=None if first < 0 else first,
                ready=True,
                # one record may come by several manifests
                owner=f"tiers {b''.join(record.names[-1:]).hex()}",
                generation=record.generation,
            )
            sequence.origin = record.origin(sequence.id)

    def keep(self, names: Listing[bytes], block_ids: Listing[int]) -> None:
        if self._void or self._engine.resting:
            return
        op, evicted = self._stores.begin(next(self._numbers), names, block_ids)
        self._stats.count_tier("tier_dropped", "host", evicted)
        self._send(op)

    def bring(self, state: RequestState, wanted: Iterable[Wanted]) -> bool:
        if state.adapter is not None:
            return False
        if self._returns.under_way(state.id):
            return True
        return not self._void and any(self._bring(state, one) for one in wanted)

    def _bring(self, state: RequestState, wanted: Wanted) -> bool:
        found = self._returns.look(state.id, wanted)
        for sequence in found.lost:
            self._finder.index.lose(sequence)
        if found.coming or not found.here or not self._costs.worth(behind=False):
            return found.coming
        number, own = next(self._numbers), self._finder.own(state)
        return self._send(self._returns.begin(number, state.id, wanted, found.here, own))

    def _send(self, op: TransferOp | None) -> bool:
        if op is None:
            return False
        self._ops.append(op)
        self._ranks_done[op.number] = 0
        return True

    def settled(self, request_id: str) -> None:
        self._returns.settled(request_id)

    def forget(self, request_id: str) -> Promoted | None:
        return self._returns.forget(request_id)

    def holds(self, sequence: Sequence) -> bool:
        if sequence.adapter:
            return False
        if self._slower:  # slower tiers are not asked for what nobody wants to read
            return True
        return any(in_pool(self._manager, name) for name in sequence.block_hashes)

    def fill(self, message: StepMessage, tokens: int) -> None:
        self._costs.step(time.monotonic(), tokens, goes_on=tokens > 0)
        self._returns.end_of_step()
        end_of_step(self._manager)
        for metric, tier, amount in take_counts(self._manager):
            self._stats.count_tier(metric, tier, amount)
        message.transfers, self._ops = self._ops, []
        message.awaited = self._awaited + self._stores.given_away()
        self._awaited = []

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
        stored, returned = self._stores.over(number, failed), self._returns.over(number, failed)
        self._stats.count_tier_pages("lost" if failed else "stored", stored)
        self._stats.count_tier_pages("returned", returned)
        self._begin_anew()

    def _begin_anew(self) -> None:
        if self._void and not self._ranks_done:
            self._manager.reset_cache()
            drop_slower(self._manager)
            list(self._manager.take_events())
            self._void = False

    def events(self) -> Iterable[Any]:
        told = list(self._manager.take_events())
        return self._events.take([] if self._void else told)  # of pages that may be read

    def due(self) -> bool:
        if self._engine.resting:
            self._drop_unsent()
            return False
        return bool(self._ranks_done)  # slower tiers go on by themselves

    def _drop_unsent(self) -> None:
        ops, self._ops = self._ops, []
        for op in ops:
            self._over(op.number, failed=True)

    def let_go(self) -> None:
        self._drop_unsent()
        self._awaited += self._returns.abandon()

    def clear(self) -> None:
        if self._slower:
            logger.warning(
                "kvcomm: slower tiers are not used any more until this engine starts anew"
            )
        self._close_manifests()
        self._slower = False
        self._events.clear([] if self._void else self._manager.take_events())
        self._void = True
        self._drop_unsent()
        self._begin_anew()

    def _close_manifests(self) -> None:
        for manifests in self._manifests:
            manifests.close()
        self._manifests = ()

    def close(self) -> None:
        if self._slower:
            let_finish(self._manager, LAST_SECONDS)
        self._close_manifests()
        self._manager.shutdown()
