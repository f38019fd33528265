# SPDX-License-Identifier: Apache-2.0
"""Taint: approximate blocks stay private in vLLM's prefix cache.

vLLM hashes a request's blocks from its token ids when they are allocated, before they are even
filled, so blocks that were reused (or computed on top of reused ones) would be served to anyone
with the same text. The chain of hashes makes one private link enough: every hash behind it is
private, too. Removing the hashes instead would not do, as a block that fills up later would get its
exact hash from an exact parent.

The request's hasher is wrapped (``Request._block_hasher``); nothing else in vLLM is touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Taint:
    """Makes the hash chain of one request private from one block on. Reversible and repeatable.

    Attributes:
        first_block: index of the first private block; None while the chain is exact.
        renamed: is told when pages of the request have come to be called otherwise.
    """

    def __init__(self, request: Request, secret: bytes) -> None:
        self.request = request
        self.secret = secret
        self.first_block: int | None = None
        self.renamed: Callable[[Request], None] = lambda request: None
        self._exact = request._block_hasher

    def apply(self, first_block: int) -> None:
        """Private from ``first_block`` on, under this request's own secret."""
        self.restore()
        self.first_block = first_block
        exact = self._exact
        assert exact is not None, "vLLM computes block hashes whenever a connector exists"

        def private_hasher(request: Request) -> list[bytes]:
            known = len(request.block_hashes)
            new: list[bytes] = exact(request)
            at = first_block - known
            if not 0 <= at < len(new):
                return new  # before the link, or behind it on a chain that is private already
            link = hashlib.sha256(b"kvcomm" + new[at] + self.secret).digest()
            request.block_hashes.extend([*new[:at], link])
            behind = exact(request)
            del request.block_hashes[known:]
            return [*new[:at], link, *behind]

        self.request._block_hasher = private_hasher
        self._rehash_from(first_block)

    def adopt(self, block_hashes: list[bytes], first_block: int) -> None:
        """Continue another request's private chain: this prompt starts with that request's very
        tokens.
        """
        self.restore()
        self.first_block = first_block
        self.request.block_hashes[:] = block_hashes
        self.request.update_block_hashes()
        self.renamed(self.request)

    def restore(self) -> None:
        """Back to the exact chain."""
        if self.first_block is None:
            return
        self.request._block_hasher = self._exact
        self._rehash_from(self.first_block)
        self.first_block = None

    def restored(self, count: int) -> list[bytes]:
        """Back to the exact chain for good, of which these are the first hashes."""
        self.restore()
        return list(self.request.block_hashes[:count])

    def exact_hashes(self, count: int) -> list[bytes]:
        """The first ``count`` hashes of the exact chain, whichever the request is on."""
        request, hasher = self.request, self._exact
        if self.first_block is None:
            return list(request.block_hashes[:count])
        assert hasher is not None
        kept = list(request.block_hashes)
        request.block_hashes.clear()
        try:
            return list(hasher(request)[:count])
        finally:
            request.block_hashes[:] = kept

    def _rehash_from(self, block: int) -> None:
        del self.request.block_hashes[block:]
        self.request.update_block_hashes()
        self.renamed(self.request)
