# SPDX-License-Identifier: Apache-2.0
"""KV events: what vLLM publishes of its prefix cache (``--kv-events-config``) is what everybody can
find there.

Routers send a prompt to the engine whose events name its pages. They hash tokens, or know vLLM's
exact hashes: a private page looks to them like a hit that no request but its own conversation gets.
So private pages, and partly filled ones, are left out when they are stored and when they are
removed. vLLM's events do not tell whose pages they are about, and it has no hook for them: the
pool's methods are wrapped.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from kvcomm_vllm.compat.pages import prefix_cache

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

FirstPrivate = Callable[["Request"], int | None]


def hide_private(pool: BlockPool, first_private: FirstPrivate) -> Callable[[bytes], None]:
    """Leave private pages out of the pool's events; nothing is wrapped where there are none.

    Args:
        first_private: the number of a request's first private page, None if all are exact.

    Returns:
        To be told the name of each page that gets one nobody is to hear of.
    """
    if not getattr(pool, "enable_kv_cache_events", False):
        return lambda name: None
    return _Events(pool, first_private).hide


class _Events:
    """The events of one pool. Hashes are those of events: vLLM may publish integers."""

    def __init__(self, pool: BlockPool, first_private: FirstPrivate) -> None:
        from vllm.distributed.kv_events import BlockRemoved, BlockStored
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

        self._pool = pool
        self._first_private = first_private
        self._removed, self._stored = BlockRemoved, BlockStored
        self._external = maybe_convert_block_hash
        self._hidden: Counter[Any] = Counter()  # pages in the cache by name
        self._cache = prefix_cache(pool)
        self._wrap("cache_full_blocks", self._cached)
        if hasattr(pool, "emit_cached_block_events"):
            self._wrap("emit_cached_block_events", self._found)
        take = pool.take_events

        @wraps(take)
        def take_events() -> Any:
            self._keep_up()
            self._drop_removed()
            return take()

        pool.take_events = take_events

    def hide(self, name: bytes) -> None:
        """A page was given a name without an event."""
        self._keep_up()
        self._hidden[self._external(name)] += 1

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
        kept = []
        for event in self._pool.kv_event_queue:
            if isinstance(event, self._removed):
                event.block_hashes = [name for name in event.block_hashes if not self._take(name)]
                if not event.block_hashes:
                    continue
            kept.append(event)
        self._pool.kv_event_queue[:] = kept

    def _take(self, name: Any) -> bool:
        """Whether a page that is gone was hidden."""
        pages = self._hidden.pop(name, 0)
        if pages > 1:
            self._hidden[name] = pages - 1
        return pages > 0

    def _keep_up(self) -> None:
        """A reset empties the cache at once; what is queued was about the pages before it."""
        cache = prefix_cache(self._pool)
        if cache is not self._cache:
            self._drop_removed()
            self._hidden.clear()
            self._cache = cache
