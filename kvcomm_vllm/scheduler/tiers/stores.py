# SPDX-License-Identifier: Apache-2.0
"""Stores: pages on their way from the KV cache into the host pool.

Nobody holds them meanwhile, so that an operator's reset never fails for them. Who is given one of
them waits for the copy's end, and that is seldom: free pages are given away oldest first.
"""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Any

from kvcomm_vllm.compat.offload import TierRequest, key_of
from kvcomm_vllm.messages import TransferOp
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.tiers.events import TierEvents


@dataclass
class Store:
    """One of them: which pages, by their keys; what vLLM called them when it began."""

    request: TierRequest
    keys: list[Any]
    pages: list[int]
    called: list[Any]


class Stores:
    """Args:
    manager: vLLM's ``OffloadingManager``.
    pages: of the KV cache.
    events: are told of what is copied.
    """

    def __init__(self, manager: Any, pages: SourcePages, events: TierEvents) -> None:
        self._events = events
        self._manager = manager
        self._pages = pages
        self._going: dict[int, Store] = {}

    def begin(
        self, number: int, names: Listing[bytes], block_ids: Listing[int]
    ) -> TransferOp | None:
        """Copy those of these pages that the pool does not have.

        None where nothing is to be copied, or there is no room while others are being copied.
        """
        there = zip(names, block_ids, strict=True)
        ids = {key_of(name): page for name, page in there if self._pages.called(page) is not None}
        if not ids:
            return None
        request = TierRequest(self._manager, f"kvcomm store {number}")
        room = self._manager.prepare_store(list(ids), request.context)
        if room is None or not room.keys_to_store:
            request.end()
            return None
        keys = list(room.keys_to_store)
        pages = [ids[key] for key in keys]
        called = [self._pages.called(page) for page in pages]
        self._events.begin(keys)
        self._going[number] = Store(request, keys, pages, called)
        return TransferOp(number, True, pages, room.store_spec.block_ids.tolist())

    def given_away(self) -> list[int]:
        """Stores of which pages have been given to somebody who is about to write them."""
        return [
            number
            for number, store in self._going.items()
            if any(
                self._pages.called(page) != called
                for page, called in zip(store.pages, store.called, strict=True)
            )
        ]

    def over(self, number: int, failed: bool) -> int:
        """How many pages it was to store, none if it is no store; unless it failed, they can be
        found in the pool now.
        """
        store = self._going.pop(number, None)
        if store is None:
            return 0
        self._manager.complete_store(store.keys, store.request.context, not failed)
        store.request.end()
        self._events.over(store.keys)
        return len(store.keys)
