# SPDX-License-Identifier: Apache-2.0
"""Pages outside this process have a tail, by which is seen whether they are what was stored."""

from __future__ import annotations

import xxhash

MARK = b"kvcomm1\0"
TAIL = len(MARK) + 16  # bytes


def tail_of(name: str, page: bytes | memoryview) -> bytes:
    """What stands behind a page of this name: a mark, and a digest of both."""
    digest = xxhash.xxh3_128(name.encode())
    digest.update(page)
    return MARK + digest.digest()
