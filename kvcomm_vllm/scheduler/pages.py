# SPDX-License-Identifier: Apache-2.0
"""Source pages: found by block hash in vLLM's own ``BlockPool``, held only while a plan uses
them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcomm_vllm.compat.adapters import adapter_number
from kvcomm_vllm.compat.events import ExactPage, PageEvents, Unheard
from kvcomm_vllm.compat.pages import cache_page, evict_soon, name_partial_page
from kvcomm_vllm.kv_groups import ONE_GROUP, KVGroups
from kvcomm_vllm.scheduler.index import Match, Sequence
from kvcomm_vllm.scheduler.spans import Source

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


@dataclass
class Kept:
    """Leading pages of a request that can be found: their hashes, and which of them are new there
    (by their number in the request).
    """

    hashes: list[bytes] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)


class SourcePages:
    """Looks pages up, and keeps them from being evicted between planning and the worker's
    confirmation.

    vLLM's rule: a cached page with no user sits in the free queue and may be handed out by the very
    next allocation, so pages are touched before the planned request's own pages are allocated.

    Args:
        events: what is published of them.
        groups: vLLM's KV cache groups. Where nothing else is said, pages are those of the group
            whose layers attend to everything.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        events: PageEvents | None = None,
        groups: KVGroups = ONE_GROUP,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.groups = groups
        self.events = events or Unheard()
        self._held: dict[str, list[KVCacheBlock]] = {}
        # are told of pages with true KV that have been put into the prefix cache, and of sequences
        # that have no others
        self.kept: Callable[[list[bytes], list[int]], None] = lambda names, block_ids: None
        self.healed: Callable[[Sequence], None] = lambda sequence: None

    def lookup(self, block_hash: bytes, group: int | None = None) -> KVCacheBlock | None:
        number = self.groups.full if group is None else group
        found = self.pool.get_cached_block(block_hash, [number])
        return found[0] if found else None

    def keep_partial(self, block_id: int, tokens: int) -> bytes | None:
        """Make a page of which ``tokens`` tokens are filled findable under a new, secret hash.

        vLLM would drop it with its request: up to a page's worth of every message's last tokens.
        """
        name = os.urandom(32)
        if not name_partial_page(self.pool, block_id, name, tokens, self.groups.full):
            return None
        self.events.hide(name)
        return name

    def put_windowed(self, group: int, block_id: int, name: bytes, tokens: int) -> None:
        """The same for a page of a windowed group, under a name that is known already, unless
        another one is. Nobody hears of these pages.
        """
        if self.lookup(name, group) is None:
            name_partial_page(self.pool, block_id, name, tokens, group)

    def put(self, name: bytes, block_id: int, tokens: int, exact: ExactPage | None = None) -> bool:
        """Make a page findable under a name that is known already, unless another one is.

        Args:
            exact: what everybody may hear of it.
        """
        if self.lookup(name) is not None:
            return False
        if not name_partial_page(self.pool, block_id, name, tokens, self.groups.full):
            return False
        if exact is None:
            self.events.hide(name)
        else:
            self.events.tell(exact)
        return True

    def called(self, block_id: int) -> Any | None:
        """What vLLM's prefix cache calls a page; it has no name once it is somebody else's."""
        return self.pool.blocks[block_id].block_hash

    @property
    def free(self) -> int:
        """Pages that can be had."""
        return int(self.pool.get_num_free_blocks())

    def keep_true(self, request: Request, block_ids: list[int], rest: int) -> Kept:
        """Put pages with a request's true KV into the prefix cache, under the request's hashes.

        They are the last ones to be evicted then, and the first of them the very last, as if the
        request had just ended. Stops at the first page that somebody has been given meanwhile.

        Args:
            request: has ended; its hashes are exact.
            block_ids: its first pages, in no use. Some may be in the cache already.
            rest: tokens in the last of them, if that is not full; it gets a name of its own.
        """
        kept, chain = Kept(), []
        full = len(block_ids) - (rest > 0)
        blocks = [self.pool.blocks[block_id] for block_id in block_ids]
        for number, block in enumerate(blocks):
            block_hash = request.block_hashes[number] if number < full else None
            known = None if block_hash is None else self.lookup(block_hash)
            if known is None:
                if block.ref_cnt or block.block_hash is not None:
                    break
                if block_hash is None:
                    block_hash = self.keep_partial(block.block_id, rest)
                else:
                    cache_page(self.pool, request, blocks, number, self.block_size)
                kept.fresh.append(number)
            assert block_hash is not None, "a page in no use can be given a name"
            kept.hashes.append(block_hash)
            chain.append(known or block)
        self.pool.touch(chain)
        if not adapter_number(request):  # tiers know of no adapters
            self.kept(kept.hashes, [block.block_id for block in chain])
        self.pool.free_blocks(reversed(chain))
        return kept

    def first_to_go(self, block_hashes: list[bytes]) -> None:
        """What nobody is likely to ask for any more is evicted before anything else is."""
        found = map(self.lookup, reversed(block_hashes))
        evict_soon(self.pool, [block for block in found if block and not block.ref_cnt])

    def alive(self, sequence: Sequence) -> bool:
        """Whether any page of the sequence is left (vLLM evicts a finished request's last pages
        first).
        """
        return any(self.lookup(block_hash) is not None for block_hash in sequence.block_hashes)

    def leading(self, block_hashes: list[bytes]) -> int:
        """Number of leading hashes that vLLM's own lookup would find: all of their pages are
        cached, and those of the last window where layers attend to one.
        """
        found = (n for n, one in enumerate(block_hashes) if self.lookup(one) is None)
        count = next(found, len(block_hashes))
        while count and (gone := self._last_gone(block_hashes, count)) is not None:
            count = gone
        return count

    def _last_gone(self, block_hashes: list[bytes], count: int) -> int | None:
        """The last page that is missing of the windows before page ``count``."""
        missing = None
        for group in self.groups.windows:
            first = self.groups.first_page(group, count * self.block_size, self.block_size)
            for number in reversed(range(first, count)):
                if self.lookup(block_hashes[number], group) is None:
                    missing = number if missing is None else min(missing, number)
                    break
        return missing

    def cached(self, block_hashes: list[bytes]) -> dict[int, int]:
        """Page ids of those that are cached, by their number in the list."""
        found = ((number, self.lookup(one)) for number, one in enumerate(block_hashes))
        return {number: block.block_id for number, block in found if block is not None}

    def sources(self, match: Match, prompt: np.ndarray) -> list[Source]:
        """The parts of a match whose pages are cached."""
        sequence, size = match.sequence, self.block_size
        stop = match.sequence_start + match.length
        same_context = match.same_context(prompt)
        shift = match.prompt_start - match.sequence_start
        found: list[Source] = []
        run: list[int] = []
        run_start = 0
        for index in range(match.sequence_start // size, -(-stop // size) + 1):
            inside = index * size < stop
            block = self.lookup(sequence.block_hashes[index]) if inside else None
            if block is not None:
                if not run:
                    run_start = max(match.sequence_start, index * size)
                run.append(block.block_id)
            elif run:
                found.append(
                    Source(
                        sequence=sequence,
                        sequence_start=run_start,
                        prompt_start=run_start + shift,
                        length=min(stop, index * size) - run_start,
                        blocks=run,
                        block_offset=run_start % size,
                        same_context=same_context,
                        lead=match.lead + run_start - match.sequence_start,
                    )
                )
                run = []
        return found

    def hashes(self, source: Source) -> list[bytes]:
        first = source.sequence_start // self.block_size
        return source.sequence.block_hashes[first : first + len(source.blocks)]

    def hold(self, request_id: str, block_ids: list[int], needed: int) -> bool:
        """Touch the pages for this request; False (and nothing held) where too few would stay free
        for its own.

        Args:
            needed: free pages the request itself will ask for.
        """
        assert request_id not in self._held, f"pages of {request_id} are held already"
        blocks = [self.pool.blocks[block_id] for block_id in sorted(set(block_ids))]
        self.pool.touch(blocks)
        self._held[request_id] = blocks
        if self.pool.get_num_free_blocks() < needed:
            self.release(request_id)
            return False
        return True

    def hold_scratch(self, request_id: str, count: int) -> list[int]:
        """Ids of ``count`` free pages, held beside the others; their content is nobody's."""
        blocks = self.pool.get_new_blocks(count) if count else []
        self._held[request_id] += blocks
        return [block.block_id for block in blocks]

    def release(self, request_id: str) -> None:
        blocks = self._held.pop(request_id, None)
        if blocks:
            # last page first, as vLLM frees a request: its head stays longest
            self.pool.free_blocks(reversed(blocks))

    def evict(self, block_ids: list[int]) -> None:
        """Nobody may find these pages any more; who uses them keeps them."""
        self.pool.evict_blocks(set(block_ids))

    @property
    def held(self) -> int:
        return sum(len(blocks) for blocks in self._held.values())
