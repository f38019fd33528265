# SPDX-License-Identifier: Apache-2.0
"""Source pages: found by block hash in vLLM's own ``BlockPool``, held only while a plan uses
them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from kvcomm_vllm import compat
from kvcomm_vllm.scheduler.index import Match, Sequence
from kvcomm_vllm.scheduler.spans import Source

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

GROUP = [0]  # one KV cache group: the connector does not ask for the hybrid allocator


class SourcePages:
    """Looks pages up, and keeps them from being evicted between planning and the worker's
    confirmation.

    vLLM's rule: a cached page with no user sits in the free queue and may be handed out by the very
    next allocation, so pages are touched before the planned request's own pages are allocated.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self._held: dict[str, list[KVCacheBlock]] = {}

    def lookup(self, block_hash: bytes) -> KVCacheBlock | None:
        found = self.pool.get_cached_block(block_hash, GROUP)
        return found[0] if found else None

    def keep_partial(self, block_id: int, tokens: int) -> bytes | None:
        """Make a page of which ``tokens`` tokens are filled findable under a new, secret hash.

        vLLM would drop it with its request: up to a page's worth of every message's last tokens.
        """
        name = os.urandom(32)
        kept = compat.name_partial_page(self.pool, block_id, name, tokens)
        return name if kept else None

    def alive(self, sequence: Sequence) -> bool:
        """Whether any page of the sequence is left (vLLM evicts a finished request's last pages
        first).
        """
        return any(self.lookup(block_hash) is not None for block_hash in sequence.block_hashes)

    def leading(self, block_hashes: list[bytes]) -> int:
        """Number of leading hashes whose pages are cached."""
        return len(self.leading_ids(block_hashes))

    def leading_ids(self, block_hashes: list[bytes]) -> list[int]:
        """Pages of the leading hashes, up to the first that is not cached."""
        found: list[int] = []
        for block_hash in block_hashes:
            block = self.lookup(block_hash)
            if block is None:
                break
            found.append(block.block_id)
        return found

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
