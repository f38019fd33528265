# SPDX-License-Identifier: Apache-2.0
"""vLLM's own block pool as its scheduler uses it, for requests that come one after another."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

GROUP = 0


class Requests:
    """Makes vLLM's requests; their block hashes are those of a server with default settings."""

    def __init__(self, block_size: int) -> None:
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(block_size, sha256)
        self._numbers = itertools.count()

    def make(
        self,
        tokens: list[int],
        salt: str | None = None,
        hints: Mapping[str, object] | None = None,
        scored: bool = False,
    ) -> Request:
        """A request with the body's ``kv_transfer_params``.

        Args:
            scored: it asks for log-probabilities of its prompt.
        """
        params = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0 if scored else None,
            extra_args={"kv_transfer_params": hints} if hints is not None else None,
        )
        params.skip_reading_prefix_cache = scored
        return Request(
            request_id=str(next(self._numbers)),
            prompt_token_ids=tokens,
            sampling_params=params,
            pooling_params=None,
            cache_salt=salt,
            arrival_time=0.0,
            block_hasher=self._hasher,
        )


class Pages:
    """Pages of a cache of ``num_blocks``; the least recently used ones are given away first."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        # one block of a pool is never handed out
        self.pool = BlockPool(num_blocks + 1, enable_caching=True, hash_block_size=block_size)
        self.block_size = block_size

    def hit(self, request: Request) -> list[KVCacheBlock]:
        """The longest cached prefix; the last token is always computed."""
        if getattr(request, "skip_reading_prefix_cache", False):
            return []
        found: list[KVCacheBlock] = []
        most = (request.num_tokens - 1) // self.block_size
        for block_hash in itertools.islice(request.block_hashes, most):
            cached = self.pool.get_cached_block(block_hash, [GROUP])
            if cached is None:
                break
            found.append(cached[0])
        return found

    def take(self, request: Request, hit: list[KVCacheBlock]) -> list[KVCacheBlock]:
        """Pages for all tokens of a request; those of the prefix are its own already."""
        self.pool.touch(hit)
        blocks = list(hit)
        self.grow(request, blocks, request.num_tokens)
        return blocks

    def grow(self, request: Request, blocks: list[KVCacheBlock], tokens: int) -> None:
        """Let ``blocks`` hold so many tokens; the full pages can be found from now on."""
        missing = -(-tokens // self.block_size) - len(blocks)
        if missing > 0:
            blocks += self.pool.get_new_blocks(missing)
        full = tokens // self.block_size
        known = next((n for n, block in enumerate(blocks) if block.block_hash is None), full)
        names: Any = {"block_size": self.block_size, "kv_cache_group_id": GROUP}
        self.pool.cache_full_blocks(request, blocks, known, full, **names)

    def free(self, blocks: list[KVCacheBlock]) -> None:
        """Its head stays longest."""
        self.pool.free_blocks(reversed(blocks))
