# SPDX-License-Identifier: Apache-2.0
"""KV events of tiers: which pages lie in the pool, and where else its managers tell of.

As vLLM's own connector publishes them, but of exact pages alone: of what listeners have heard when
it lay in the KV cache, and of what everybody may ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvcomm_vllm.compat.events import ExactPage, removed
from kvcomm_vllm.compat.offload import medium_of, name_of

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingEvent

POOL = ("CPU", None)  # as vLLM calls it


@dataclass
class Lying:
    """A page and where listeners take it to lie: medium and, if it is not the pool, whose.

    Attributes:
        copies: to the pool that are under way.
    """

    page: ExactPage
    places: set[tuple[str, str | None]] = field(default_factory=set)
    copies: int = 0


class TierEvents:
    """Args:
    sources: say what may be told of a page, if anything.
    """

    def __init__(self, sources: Listing[Callable[[bytes], ExactPage | None]]) -> None:
        self._sources = sources
        self._pages: dict[Any, Lying] = {}
        self._copied: list[Any] = []  # its event comes later
        self._told: list[Any] = []  # what is to be published next

    def begin(self, keys: Iterable[Any]) -> None:
        """Copies of these pages are on their way to the pool: what is known of them now may be
        forgotten when they arrive.
        """
        for key in keys:
            lying = self._known(key)
            if lying is not None:
                lying.copies += 1

    def over(self, keys: Iterable[Any]) -> None:
        self._copied += [key for key in keys if key in self._pages]

    def _known(self, key: Any) -> Lying | None:
        if key not in self._pages:
            asked = (source(name_of(key)) for source in self._sources)
            page = next((page for page in asked if page is not None), None)
            if page is None:
                return None
            self._pages[key] = Lying(page)
        return self._pages[key]

    def take(self, events: Iterable[OffloadingEvent]) -> list[Any]:
        """What is to be published of what managers say."""
        told, self._told = self._told, []
        touched: list[Any] = []
        for event in events:
            told += self._removed(event) if event.removed else self._stored(event)
            touched += event.keys
        for key in self._copied:
            if key in self._pages:
                self._pages[key].copies -= 1
        touched += self._copied
        self._copied = []
        for key in touched:
            lying = self._pages.get(key)
            if lying and not lying.places and not lying.copies:
                del self._pages[key]
        return told

    def _stored(self, event: OffloadingEvent) -> Iterable[Any]:
        medium, where = medium_of(event), _where(event)
        for key in event.keys:
            lying = self._known(key)
            if lying is not None:
                place = medium, event.ownership
                if event.removal_expected or place == POOL:
                    lying.places.add(place)
                yield lying.page.stored(medium, **where)

    def _removed(self, event: OffloadingEvent) -> Iterable[Any]:
        place = medium_of(event), event.ownership
        there = [self._pages[key] for key in event.keys if key in self._pages]
        there = [lying for lying in there if place in lying.places]
        for lying in there:
            lying.places.remove(place)
        names = [lying.page.name for lying in there]
        if names:
            yield removed(names, place[0], **_where(event))

    def clear(self, events: Iterable[OffloadingEvent]) -> None:
        """After these events, nothing that lies anywhere may be read any more."""
        self._told = self.take(events)
        places = {place for lying in self._pages.values() for place in lying.places}
        for medium, owner in sorted(places, key=str):
            found = (one for one in self._pages.values() if (medium, owner) in one.places)
            names = [lying.page.name for lying in found]
            self._told.append(removed(names, medium, ownership=owner))
        self._pages.clear()
        self._copied.clear()


def _where(event: OffloadingEvent) -> dict[str, str | None]:
    locality = event.locality.value if event.locality is not None else None
    return {"locality": locality, "ownership": event.ownership}
