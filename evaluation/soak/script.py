# SPDX-License-Identifier: Apache-2.0
"""What is sent: an endless deck of items of every kind, the same for the same seed."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

from kvcomm_vllm.evaluation.soak.endings import ENDINGS
from kvcomm_vllm.evaluation.soak.endpoints import ENDPOINTS
from kvcomm_vllm.evaluation.soak.hinted import HINTED
from kvcomm_vllm.evaluation.soak.item import Item
from kvcomm_vllm.evaluation.soak.refusals import REFUSALS
from kvcomm_vllm.evaluation.soak.texts import Letter, Tenant

KINDS = {**ENDINGS, **ENDPOINTS, **HINTED, **REFUSALS}
SALTS = (None, "north", "south")
DECK = sum(KINDS.values())  # items after which every kind has been sent as often as it says


class Script:
    """Items in order, for any number of clients; a deck of all kinds is dealt again and again."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        letters: list[Letter] = []
        self._tenants = [Tenant(random.Random(f"{seed} {salt}"), salt, letters) for salt in SALTS]
        self._lock = threading.Lock()
        self._deck: list[str] = []
        self._by_name = {make.__name__: make for make in KINDS}
        self._number = 0

    def next(self) -> Item:
        with self._lock:
            if not self._deck:
                self._deck = [make.__name__ for make, count in KINDS.items() for _ in range(count)]
                self._rng.shuffle(self._deck)
            kind, tenant = self._deck.pop(), self._rng.choice(self._tenants)
            item = self._by_name[kind](self._rng, tenant)
            self._number += 1
            body = item.body
            if isinstance(body, dict):
                body = {"temperature": 0, **body}
            return replace(item, number=self._number, kind=kind, body=body, salt=tenant.salt)
