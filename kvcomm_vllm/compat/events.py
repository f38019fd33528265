# SPDX-License-Identifier: Apache-2.0
"""KV events: what vLLM publishes of its prefix cache (``--kv-events-config``) is what everybody can
find there.

Routers send a prompt to the engine whose events name its pages. They hash tokens, or know vLLM's
exact hashes: a private page looks to them like a hit that no request but its own conversation gets.
So private pages, and partly filled ones, are left out when they are stored and when they are
removed. vLLM's events do not tell whose pages they are about, and it has no hook for them: the
pool's methods are wrapped. What has been told of a page is known meanwhile, to be told of its
copies elsewhere.
"""

from __future__ import annotations

import inspect
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

from kvcomm_vllm.compat.pages import prefix_cache

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

FirstPrivate = Callable[["Request"], int | None]


@dataclass(frozen=True, slots=True)
class ExactPage:
    """What events tell of a page that everybody can find; hashes as they stand in events.

    Args:
        extra_keys: what its hash is made of beside parent and tokens.
    """

    name: Any
    parent: Any | None
    tokens: array[int]
    extra_keys: tuple[Any, ...] | None

    def stored(self, medium: str, **where: str | None) -> Any:
        """The event that it lies there now."""
        from vllm.distributed.kv_events import BlockStored

        return BlockStored(
            block_hashes=[self.name],
            parent_block_hash=self.parent,
            token_ids=self.tokens.tolist(),
            block_size=len(self.tokens),
            lora_id=None,
            medium=medium,
            lora_name=None,
            extra_keys=[self.extra_keys],
            group_idx=0,
            **where,
        )


def removed(names: list[Any], medium: str, **where: str | None) -> Any:
    """The event that pages of these names do not lie there any more."""
    from vllm.distributed.kv_events import BlockRemoved

    return BlockRemoved(names, medium, group_idx=0, **where)


def exact_page(
    names: Sequence[bytes], number: int, tokens: Sequence[int], salt: str | None
) -> ExactPage:
    """The ``number``-th page of a text.

    Args:
        names: of its pages; ``tokens``: of this one.
        salt: with which vLLM has made the first name.
    """
    from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

    return ExactPage(
        maybe_convert_block_hash(BlockHash(names[number])),
        maybe_convert_block_hash(BlockHash(names[number - 1])) if number else None,
        array("i", tokens),
        (salt,) if salt and not number else None,
    )


class PageEvents(Protocol):
    """What is published of the KV cache."""

    on: bool  # whether anything is
    remembers: bool  # what has been told; nothing by itself

    def hide(self, name: bytes) -> None:
        """A page is given a name nobody is to hear of."""

    def tell(self, page: ExactPage) -> None:
        """A page was given its name by others than vLLM."""

    def told(self, name: bytes) -> ExactPage | None:
        """What has been told of a page that lies in the KV cache, or has until now."""


class Unheard:
    """Nobody listens."""

    on = False
    remembers = False

    def hide(self, name: bytes) -> None:
        pass

    def tell(self, page: ExactPage) -> None:
        pass

    def told(self, name: bytes) -> ExactPage | None:
        return None


def hide_private(pool: BlockPool, first_private: FirstPrivate) -> PageEvents:
    """Leave private pages out of the pool's events; nothing is wrapped where there are none.

    Args:
        first_private: the number of a request's first private page, None if all are exact.
    """
    if not getattr(pool, "enable_kv_cache_events", False):
        return Unheard()
    return _Events(pool, first_private)


class _Events:
    """The events of one pool. Hashes are those of events: vLLM may publish integers."""

    on = True
    remembers = False

    def __init__(self, pool: BlockPool, first_private: FirstPrivate) -> None:
        from vllm.distributed.kv_events import BlockRemoved, BlockStored
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

        self._pool = pool
        self._first_private = first_private
        self._removed, self._stored = BlockRemoved, BlockStored
        self._external = maybe_convert_block_hash
        self._hidden: Counter[Any] = Counter()  # pages in the cache by name
        self._copies: Counter[Any] = Counter()  # of those that were told
        self._told: dict[Any, ExactPage] = {}
        self._seen = 0  # events at the head of the queue that have been looked through
        self._cache = prefix_cache(pool)
        self._wrap("cache_full_blocks", self._cached)
        if hasattr(pool, "emit_cached_block_events"):
            self._wrap("emit_cached_block_events", self._found)
        take = pool.take_events

        @wraps(take)
        def take_events() -> Any:
            self._keep_up()
            self._drop_removed()
            self._seen = 0
            return take()

        pool.take_events = take_events

    def hide(self, name: bytes) -> None:
        self._keep_up()
        self._hidden[self._external(name)] += 1

    def tell(self, page: ExactPage) -> None:
        self._keep_up()
        self._pool.kv_event_queue.append(page.stored(self._pool.medium))
        self._remember(page)

    def told(self, name: bytes) -> ExactPage | None:
        self._keep_up()
        return self._told.get(self._external(name))

    def _remember(self, page: ExactPage) -> None:
        if self.remembers:
            self._told[page.name] = page
            self._copies[page.name] += 1

    def _wrap(self, method: str, then: Callable[[list[Any], dict[str, Any]], None]) -> None:
        call = getattr(self._pool, method)
        signature = inspect.signature(call)

        @wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            self._keep_up()
            before = len(self._pool.kv_event_queue)
            call(*args, **kwargs)
            new = self._pool.kv_event_queue[before:]
            then(new, signature.bind(*args, **kwargs).arguments)
            self._pool.kv_event_queue[before:] = [
                event for event in new if not isinstance(event, self._stored) or event.block_hashes
            ]

        setattr(self._pool, method, wrapped)

    def _cached(self, new: list[Any], given: dict[str, Any]) -> None:
        """A request's pages have been given their hashes."""
        first = given["num_cached_blocks"]
        self._hidden.update(self._cut(new, given["request"], first, given["num_full_blocks"]))
        for event in new if self.remembers else ():
            if isinstance(event, self._stored):
                self._remember_all(event)

    def _remember_all(self, event: Any) -> None:
        parent, size = event.parent_block_hash, event.block_size
        for number, name in enumerate(event.block_hashes):
            tokens = array("i", event.token_ids[number * size : (number + 1) * size])
            extra_keys = event.extra_keys and event.extra_keys[number]
            self._remember(ExactPage(name, parent, tokens, extra_keys))
            parent = name

    def _found(self, new: list[Any], given: dict[str, Any]) -> None:
        """A request has found its pages in the cache (``kv_cache_report_mode: full``)."""
        self._cut(new, given["request"], 0, given["num_cached_blocks"])

    def _cut(self, new: list[Any], request: Request, first: int, end: int) -> list[Any]:
        """Take a request's private pages, of those from ``first`` to ``end``, out of new events;
        their hashes.
        """
        private = self._first_private(request)
        if private is None:
            return []
        hashes = set(map(self._external, request.block_hashes[max(private, first) : end]))
        cut: list[Any] = []
        for event in new:
            if isinstance(event, self._stored):
                keep = [block_hash not in hashes for block_hash in event.block_hashes].count(True)
                cut += event.block_hashes[keep:]  # a chain is private to its end
                event.block_hashes = event.block_hashes[:keep]
                event.token_ids = event.token_ids[: keep * event.block_size]
                event.extra_keys = event.extra_keys and event.extra_keys[:keep]
        return cut

    def _drop_removed(self) -> None:
        """Nobody hears that pages are gone of which nobody has heard."""
        kept = self._pool.kv_event_queue[: self._seen]
        for event in self._pool.kv_event_queue[self._seen :]:
            if isinstance(event, self._removed):
                event.block_hashes = [name for name in event.block_hashes if not self._take(name)]
                if not event.block_hashes:
                    continue
            kept.append(event)
        self._pool.kv_event_queue[:] = kept
        self._seen = len(kept)

    def _take(self, name: Any) -> bool:
        """Whether a page that is gone was hidden."""
        if _less(self._hidden, name):
            return True
        _less(self._copies, name)
        if name not in self._copies:
            self._told.pop(name, None)
        return False

    def _keep_up(self) -> None:
        """A reset empties the cache at once; what is queued was about the pages before it."""
        cache = prefix_cache(self._pool)
        if cache is not self._cache:
            self._drop_removed()
            for pages in (self._hidden, self._copies, self._told):
                pages.clear()
            self._cache = cache


def _less(pages: Counter[Any], name: Any) -> bool:
    """One page less of this name; whether there was one."""
    count = pages.pop(name, 0)
    if count > 1:
        pages[name] = count - 1
    return count > 0
