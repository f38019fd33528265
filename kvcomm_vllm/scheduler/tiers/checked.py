# SPDX-License-Identifier: Apache-2.0
"""Pages on their way between the host pool and what lies behind it. Outside this process they have
a tail, by which is seen whether they are what was stored.
"""

from __future__ import annotations

import xxhash
from vllm.v1.kv_offload.tiering.base import TransferJob

MARK = b"kvcomm1\0"
TAIL = len(MARK) + 16  # bytes


def tail_of(name: str, page: bytes | memoryview) -> bytes:
    """What stands behind a page of this name: a mark, and a digest of both."""
    digest = xxhash.xxh3_128(name.encode())
    digest.update(page)
    return MARK + digest.digest()


def pages_of(job: TransferJob, pool: memoryview) -> list[memoryview]:
    """The pool's pages that a job is about, in the order of its keys.

    Args:
        pool: ``[chunks, bytes]``.
    """
    assert pool.strides is not None
    size, flat = pool.strides[0], pool.cast("B")
    starts = [int(chunk) * size for chunk in job.chunk_ids]
    return [flat[start : start + size] for start in starts]
