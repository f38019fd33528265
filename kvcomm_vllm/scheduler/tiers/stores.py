# SPDX-License-Identifier: Apache-2.0
"""Stores: pages on their way from the KV cache into the host pool."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Any

from kvcomm_vllm.compat.offload import TierRequest, key_of
from kvcomm_vllm.messages import TransferOp
from kvcomm_vllm.scheduler.pages import SourcePages


@dataclass
class Store:
    """One of them: which pages, by their keys, and who holds them."""

    request: TierRequest
    keys: list[Any]
    holder: str


class Stores:
    """Args:
    manager: vLLM's ``OffloadingManager``.
    pages: of the KV cache.
    """

    def __init__(self, manager: Any, pages: SourcePages) -> None:
        self._manager = manager
        self._pages = pages
        self._going: dict[int, Store] = {}

    def begin(
        self, number: int, names: Listing[bytes], block_ids: Listing[int]
    ) -> TransferOp | None:
        """Copy those of these pages that the pool does not have; they are held until then.

        None where nothing is to be copied, or there is no room while others are being copied.
        """
        request = TierRequest(self._manager, f"kvcomm store {number}")
        ids = dict(zip(map(key_of, names), block_ids, strict=True))
        room = self._manager.prepare_store(list(ids), request.context)
        if room is None or not room.keys_to_store:
            request.end()
            return None
        store = Store(request, list(room.keys_to_store), f"store {number}")
        pages = [ids[key] for key in store.keys]
        self._pages.hold(store.holder, pages, needed=0)
        self._going[number] = store
        return TransferOp(number, True, pages, room.store_spec.block_ids.tolist())

    def over(self, number: int, failed: bool) -> bool:
        """Whether it was a store; the pages can be found in the pool now unless it failed."""
        store = self._going.pop(number, None)
        if store is None:
            return False
        self._pages.release(store.holder)
        self._manager.complete_store(store.keys, store.request.context, not failed)
        store.request.end()
        return True
