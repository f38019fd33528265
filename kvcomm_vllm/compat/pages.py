# SPDX-License-Identifier: Apache-2.0
"""vLLM's prefix cache: pages that it would not name, or would keep for longer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


def prefix_cache(pool: BlockPool) -> Any | None:
    """The pool's table of cached pages. A reset puts a new one in its place, and tells nobody."""
    return getattr(pool, "cached_block_hash_to_block", None)


def name_partial_page(
    pool: BlockPool, block_id: int, name: bytes, tokens: int, group: int = 0
) -> bool:
    """Give a page that is not full a name in vLLM's prefix cache, so that it can be looked up, and
    is evicted, like any other; False where that is not possible.

    vLLM names full pages alone. Nobody but who knows ``name`` finds this one.
    """
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    block = pool.blocks[block_id]
    if block.is_null or block.block_hash is not None:
        return False
    key = make_block_hash_with_group_id(BlockHash(name), group)
    pool._insert_block_hash(key, block, num_tokens=tokens)
    return True


def cache_page(
    pool: BlockPool, request: Request, blocks: list[KVCacheBlock], number: int, block_size: int
) -> None:
    """Give a request's ``number``-th page, which is full, its hash in vLLM's prefix cache; whoever
    listens to vLLM's KV events hears of it.
    """
    pool.cache_full_blocks(
        request=request,
        blocks=blocks,
        num_cached_blocks=number,
        num_full_blocks=number + 1,
        block_size=block_size,
        kv_cache_group_id=0,
    )


def evict_soon(pool: BlockPool, blocks: list[KVCacheBlock]) -> None:
    """Cached pages in no use become the first that are evicted; until then they can be found."""
    queue = pool.free_block_queue
    for block in blocks:
        queue.remove(block)
    queue.prepend_n(blocks)
