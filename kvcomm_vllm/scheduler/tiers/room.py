# SPDX-License-Identifier: Apache-2.0
"""Room on disk, which all engines of a folder share: what was used longest ago makes place."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

ROOM = 0.9  # of the limit is left when pages had to go
UNFINISHED_SECONDS = 600
SKEW_SECONDS = 60  # beyond that what was used in the future counts as used now
NUMBER = 8  # bytes of the number in the ledger


class SharedRoom:
    """One engine's view of it. Engines note in a ledger what they are about to write, so that
    together they keep the limit.

    Args:
        root: the folder.
        max_bytes: most that its pages have, those of all engines together.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._ledger = root / "used"
        self._max_bytes = max_bytes
        self._looked = False  # at all files, which may be others than the ledger says

    def take(self, size: int) -> int:
        """Make sure that so many bytes may be written now; how many pages had to go for it.

        Raises:
            OSError: the folder cannot be written.
        """
        gone = 0
        ledger = os.open(self._ledger, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            with suppress(OSError):  # volumes without locks; then engines may miss each other's
                fcntl.flock(ledger, fcntl.LOCK_EX)
            noted = os.pread(ledger, NUMBER, 0)
            used = int.from_bytes(noted, "little")
            if not self._looked or len(noted) < NUMBER or used + size > self._max_bytes:
                used, gone = make_room(self._root, self._max_bytes - size)
                self._looked = True
            os.pwrite(ledger, (used + size).to_bytes(NUMBER, "little"), 0)
        finally:
            os.close(ledger)
        return gone


def make_room(root: Path, max_bytes: int) -> tuple[int, int]:
    """Remove what was used longest ago, if pages have more than the limit, what was never finished,
    and manifests that are older than every page.

    Returns:
        How many bytes the pages have that are left, and how many pages were removed.
    """
    pages: list[tuple[float, int, str]] = []
    manifests: list[tuple[float, str]] = []
    now = time.time()
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with suppress(FileNotFoundError):  # another engine was faster
                found = os.stat(path)
                if found.st_mtime > now + SKEW_SECONDS:
                    os.utime(path)
                    found = os.stat(path)
                if name.endswith(".tmp") and now - found.st_mtime > UNFINISHED_SECONDS:
                    os.unlink(path)
                elif name.endswith(".bin"):
                    pages.append((found.st_mtime, found.st_size, path))
                elif name.endswith(".log"):
                    manifests.append((found.st_mtime, path))
    total = sum(size for _, size, _ in pages)
    if total <= max_bytes:
        return total, 0
    gone = 0
    pages.sort(reverse=True)
    while pages and total > ROOM * max_bytes:
        _, size, path = pages.pop()
        total -= size
        with suppress(FileNotFoundError):
            os.unlink(path)
            gone += 1
    oldest = pages[-1][0] if pages else now
    for written, path in manifests:
        if written < oldest:
            with suppress(FileNotFoundError):
                os.unlink(path)
    return total, gone
