# SPDX-License-Identifier: Apache-2.0
"""Returns: pages on their way back into the KV cache, for a request that waits for them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from kvcomm_vllm.compat.events import ExactPage
from kvcomm_vllm.compat.offload import Found, TierRequest, in_pool, key_of, look_up
from kvcomm_vllm.messages import TransferOp
from kvcomm_vllm.scheduler.index import Sequence
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.promoted import Promoted
from kvcomm_vllm.scheduler.tiers.costs import Costs
from kvcomm_vllm.scheduler.tiers.wanted import Wanted

MOST_LOSSES = 3  # for which one request looks for other copies


@dataclass
class Waiting:
    """A request, and what is being brought back for it.

    Attributes:
        since: when it was first asked for, or for the next transfer.
        number: of the transfer under way, if any; ``names``, ``block_ids``, ``tokens``: its pages.
        holders: who holds what was brought, and what is read beside it, until that is planned.
        gone: the request has ended meanwhile; ``given_up``: its pages could not be copied;
            ``abandoned``: they must not be read; ``behind``: some came from behind the pool.
        wanted: what was last looked for.
        losses: how often of that was found out that it is lost.
        promoted: what has been brought back; None before the first transfer is over.
    """

    request: TierRequest
    since: float
    number: int | None = None
    names: list[bytes] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    holders: list[str] = field(default_factory=list)
    gone: bool = False
    given_up: bool = False
    abandoned: bool = False
    behind: bool = False
    wanted: Wanted | None = None
    losses: int = 0
    promoted: Promoted | None = None


@dataclass(frozen=True)
class Looked:
    """What came of looking for pages.

    Attributes:
        here: those that lie in the pool and not in the KV cache.
        coming: whether more of them may come to the pool, which is worth waiting for.
        lost: sequences of which pages are nowhere, as is new.
    """

    here: list[bytes] = field(default_factory=list)
    coming: bool = False
    lost: list[Sequence] = field(default_factory=list)


class Returns:
    """Args:
    manager: vLLM's ``OffloadingManager``.
    pages: of the KV cache.
    wait_seconds: longest time a request waits for what slower tiers have.
    costs: of bringing back and of computing.
    """

    def __init__(self, manager: Any, pages: SourcePages, wait_seconds: float, costs: Costs) -> None:
        self._manager = manager
        self._pages = pages
        self._wait_seconds = wait_seconds
        self._costs = costs
        self._waiting: dict[str, Waiting] = {}

    def under_way(self, request_id: str) -> bool:
        waiting = self._waiting.get(request_id)
        return waiting is not None and waiting.number is not None

    def look(self, request_id: str, wanted: Wanted) -> Looked:
        """What of it there is outside the KV cache."""
        names = [name for name in wanted.pages if self._pages.lookup(name) is None]
        if not names:
            return Looked()
        waiting = self._waiting.get(request_id)
        if waiting is None:
            request = TierRequest(self._manager, f"kvcomm return {request_id}")
            waiting = self._waiting[request_id] = Waiting(request, time.monotonic())
        waiting.wanted = wanted
        if waiting.given_up:
            return Looked()
        patient = time.monotonic() - waiting.since < self._wait_seconds
        patient = patient and self._costs.worth(behind=True)
        here: list[bytes] = []
        nowhere: set[bytes] = set()
        coming = False
        for name in names:
            if patient:
                found = look_up(self._manager, name, waiting.request.context)
            else:  # what begins to come to a full pool drives out what has just been found there
                found = Found.HERE if in_pool(self._manager, name) else Found.NOWHERE
            if found is Found.HERE:
                here.append(name)
            elif found is Found.COMING:
                coming = waiting.behind = True
            elif wanted.chained:
                break
            else:
                nowhere.add(name)
        return Looked(here, coming, self._lost(waiting, wanted, nowhere) if patient else [])

    def _lost(self, waiting: Waiting, wanted: Wanted, names: set[bytes]) -> list[Sequence]:
        """Each is a reason to look for another copy, and a request waits only so often."""
        if not names or waiting.losses == MOST_LOSSES:
            return []
        lost = [s for s in wanted.sequences if s.intact and not names.isdisjoint(s.block_hashes)]
        waiting.losses += bool(lost)
        return lost

    def begin(
        self, number: int, request_id: str, wanted: Wanted, names: list[bytes], own: int
    ) -> TransferOp | None:
        """Copy these pages back; None where there is no room beside the request's own.

        Args:
            own: free pages the request will ask for; a chain will be some of these.
        """
        there = [block for name in wanted.pages if (block := self._pages.lookup(name))]
        holder = f"return {number}"
        # held while free pages are chosen, which are to be others
        if not self._pages.hold(holder, [block.block_id for block in there], own):
            return None
        room = self._pages.free - (0 if wanted.chained else own)
        names = names[: max(room, 0)]
        if not names:
            self._pages.release(holder)
            return None
        waiting = self._waiting[request_id]
        waiting.holders.append(holder)
        waiting.number, waiting.names = number, names
        waiting.tokens = [wanted.pages[name] for name in names]
        waiting.block_ids = self._pages.hold_scratch(holder, len(names))
        keys = [key_of(name) for name in names]
        chunks = self._manager.prepare_load(keys, waiting.request.context)
        return TransferOp(number, False, waiting.block_ids, chunks.block_ids.tolist())

    def over(self, number: int, failed: bool) -> int:
        """How many pages a transfer of this number has brought back."""
        found = ((r, w) for r, w in self._waiting.items() if w.number == number)
        request_id, waiting = next(found, ("", None))
        if waiting is None:
            return 0
        self._manager.complete_load(
            [key_of(name) for name in waiting.names], waiting.request.context
        )
        exact = [self._exact(waiting, name) for name in waiting.names]
        took = time.monotonic() - waiting.since
        self._costs.brought(len(waiting.names), took, waiting.behind)
        usable = not failed and not waiting.abandoned
        pages = zip(waiting.names, waiting.block_ids, waiting.tokens, exact, strict=True)
        brought = sum(self._pages.put(*page) for page in pages) if usable else 0
        waiting.promoted = waiting.promoted or Promoted()
        waiting.promoted.add(brought, took, waiting.behind)
        waiting.number, waiting.names, waiting.given_up = None, [], failed
        waiting.since, waiting.behind = time.monotonic(), False
        waiting.abandoned = False
        if waiting.gone:
            self.forget(request_id)
        return brought

    def exact(self, name: bytes) -> ExactPage | None:
        """What everybody may hear of a page that a request waits for."""
        found = (self._exact(waiting, name) for waiting in self._waiting.values())
        return next((page for page in found if page is not None), None)

    def _exact(self, waiting: Waiting, name: bytes) -> ExactPage | None:
        if not self._pages.events.on or waiting.wanted is None:
            return None
        return waiting.wanted.exact(name, self._pages.block_size)

    def settled(self, request_id: str) -> None:
        """The request holds what it reads itself."""
        if request_id not in self._waiting or self.under_way(request_id):
            return
        self._let_go(self._waiting[request_id])

    def _let_go(self, waiting: Waiting) -> None:
        for holder in waiting.holders:
            self._pages.release(holder)
        waiting.holders.clear()

    def abandon(self) -> list[int]:
        """Hold nothing any more; transfers that are under way, and write pages that others may be
        given.
        """
        for waiting in self._waiting.values():
            self._let_go(waiting)
            waiting.abandoned = waiting.number is not None
        return [w.number for w in self._waiting.values() if w.number is not None]

    def end_of_step(self) -> None:
        """Who was not asked about in a step must not keep others from being served in the next."""
        for request_id in self._waiting:
            self.settled(request_id)

    def forget(self, request_id: str) -> Promoted | None:
        """The request has ended; what was brought back for it, if anything."""
        waiting = self._waiting.get(request_id)
        if waiting is None:
            return None
        if waiting.number is not None:
            waiting.gone = True
            return waiting.promoted
        self.settled(request_id)
        del self._waiting[request_id]
        waiting.request.end()
        return waiting.promoted
