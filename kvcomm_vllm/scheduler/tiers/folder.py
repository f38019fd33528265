# SPDX-License-Identifier: Apache-2.0
"""Manifests in a folder, beside the pages on disk: each engine appends to files of its own, and the
oldest of all go when there are too many.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vllm.logger import init_logger

from kvcomm_vllm.scheduler.index import Sequence
from kvcomm_vllm.scheduler.tiers.manifests import DIGEST, DamagedError, Record, packed, unpacked

logger = init_logger("vllm.kvcomm")

LENGTH = 4  # bytes before a record and its digest: the record's length
MOST_BYTES = 256 << 20  # of a folder's: more tokens than an index remembers
FILES = 16  # have that; then the next one is begun


class FolderManifests:
    """Those of one folder.

    Args:
        folder: for its owner alone.
        secret: of tenants' digests.
        max_bytes: most that lies in it, but for what engines that write there at the same time have
            in their newest files.
    """

    def __init__(self, folder: Path, secret: bytes, max_bytes: int = MOST_BYTES) -> None:
        self.secret = secret
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._max_bytes = max_bytes
        self._read_to: dict[str, int] = {}  # by file name
        self._own: set[str] = set()
        self._file: Path | None = None

    def append(self, sequence: Sequence) -> None:
        data = packed(sequence)
        head = (len(data) - DIGEST).to_bytes(LENGTH, "little")
        try:
            file = os.open(self._current(), os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            try:
                os.write(file, head + data)
            finally:
                os.close(file)
        except OSError as error:
            logger.warning_once("kvcomm: what is on disk will not be found again: %s", error)

    def _current(self) -> Path:
        """The file that is written; one that has been removed is gone for good."""
        file, size = self._file, self._max_bytes // FILES
        if file is None or not file.exists() or file.stat().st_size > size:
            self._make_room(self._max_bytes - size)
            name = f"{time.time_ns():020d}-{os.getpid()}-{os.urandom(4).hex()}.log"
            self._own.add(name)
            self._file = file = self._folder / name
        return file

    def _make_room(self, most: int) -> None:
        """Who is asked for again is written down again: what was written longest ago goes first."""
        files: list[tuple[int, int, str]] = []
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):  # another engine was faster
                found = entry.stat()
                files.append((found.st_mtime_ns, found.st_size, entry.name))
        self._own &= {name for _, _, name in files}
        total = sum(size for _, size, _ in files)
        for _, size, name in sorted(files):
            if total <= most:
                break
            total -= size
            (self._folder / name).unlink(missing_ok=True)

    def news(self) -> Iterator[Record]:
        """What others have written since this was last asked, file by file, the oldest first."""
        try:
            names = sorted(entry.name for entry in os.scandir(self._folder))
        except OSError:
            return
        for name in self._read_to.keys() - names:
            del self._read_to[name]
        for name in names:
            if name.endswith(".log") and name not in self._own:
                yield from self._records(name)

    def _records(self, name: str) -> Iterator[Record]:
        path, at = self._folder / name, self._read_to.get(name, 0)
        try:
            if path.stat().st_size <= at:
                return
            with path.open("rb") as file:
                file.seek(at)
                data = file.read()
        except OSError:
            return
        begin = 0
        while (start := begin + LENGTH) + DIGEST <= len(data):
            end = start + DIGEST + int.from_bytes(data[begin:start], "little")
            if end > len(data):
                break  # it is being written, or never was: the next look will tell
            try:
                record = unpacked(data[start:end])
            except DamagedError:
                logger.warning("kvcomm: %s is damaged, what follows in it is not read", path)
                self._read_to[name] = 1 << 62
                return
            begin = end
            if record is not None:
                yield record
        self._read_to[name] = at + begin

    def close(self) -> None:
        pass


def tenant_key(folder: Path) -> bytes:
    """What makes digests of tenants' salts: one key for all engines of a folder, made by the first.

    Raises:
        OSError: it can be neither read nor made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / "key"
    try:
        made = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return _read_key(path)
    with open(made, "wb") as file:
        file.write(os.urandom(32))
    return path.read_bytes()


def _read_key(path: Path) -> bytes:
    for _ in range(100):  # another engine may be writing it
        key = path.read_bytes()
        if len(key) == 32:
            return key
        time.sleep(0.05)
    raise OSError(f"{path} holds no key of 32 bytes")
