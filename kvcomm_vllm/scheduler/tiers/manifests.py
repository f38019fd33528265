# SPDX-License-Identifier: Apache-2.0
"""Manifests: by what text is found whose pages lie on disk, after a restart and by other engines.

Each engine appends to a file of its own in a folder they share; a record is a stored sequence.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import xxhash
from vllm.logger import init_logger

from kvcomm_vllm.scheduler.index import I32, Origin, Sequence

logger = init_logger("vllm.kvcomm")

HEAD = 12  # bytes before a record: its length, and its digest
MOST_BYTES = 64 << 20  # in one file; then the next one is begun


class Record(msgspec.Struct, array_like=True, frozen=True):
    """A :class:`~kvcomm_vllm.scheduler.index.Sequence` as it is written: tokens as int32, tenant
    as a keyed digest, ``first_approximate`` negative where all of it is exact. ``repeats`` is that
    of its origin.
    """

    namespace: bytes
    tokens: bytes
    names: list[bytes]
    prompt: int
    first_approximate: int
    generation: int
    repeats: bytes

    @classmethod
    def of(cls, sequence: Sequence) -> Record:
        first, origin = sequence.first_approximate, sequence.origin
        return cls(
            namespace=sequence.namespace,
            tokens=sequence.tokens.astype("<i4").tobytes(),
            names=list(sequence.block_hashes),
            prompt=sequence.num_prompt_tokens,
            first_approximate=-1 if first is None else first,
            generation=sequence.generation,
            repeats=b"" if origin is None else origin.repeats.tobytes(),
        )

    def token_ids(self) -> I32:
        return np.frombuffer(self.tokens, "<i4").astype(np.int32)

    def origin(self, sequence_id: int) -> Origin | None:
        """Whose KV it was is not known any more: it counts as computed where it stands."""
        if not self.repeats:
            return None
        seen = np.frombuffer(self.repeats, np.uint8).copy()
        return Origin(seen, np.full(len(seen), sequence_id, np.int32))


class Manifests:
    """Those of one folder.

    Args:
        folder: for its owner alone.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._read_to: dict[str, int] = {}  # by file name
        self._own: set[str] = set()
        self._file: Path | None = None
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Record)

    def append(self, sequence: Sequence) -> None:
        """Write a sequence down. A disk that cannot be written to costs no more than that it is not
        found again.
        """
        body = self._encoder.encode(Record.of(sequence))
        head = len(body).to_bytes(4, "little") + xxhash.xxh3_64_digest(body)
        try:
            file = os.open(self._current(), os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            try:
                os.write(file, head + body)
            finally:
                os.close(file)
        except OSError as error:
            logger.warning_once("kvcomm: what is on disk will not be found again: %s", error)

    def _current(self) -> Path:
        if self._file is None or (self._file.exists() and self._file.stat().st_size > MOST_BYTES):
            name = f"{time.time_ns():020d}-{os.getpid()}-{os.urandom(4).hex()}.log"
            self._own.add(name)
            self._file = self._folder / name
        return self._file

    def news(self) -> Iterator[Record]:
        """What others have written since this was last asked, file by file, the oldest first."""
        try:
            names = sorted(entry.name for entry in os.scandir(self._folder))
        except OSError:
            return
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
        while begin + HEAD <= len(data):
            end = begin + HEAD + int.from_bytes(data[begin : begin + 4], "little")
            if end > len(data):
                break  # it is being written, or never was: the next look will tell
            body = data[begin + HEAD : end]
            if xxhash.xxh3_64_digest(body) != data[begin + 4 : begin + HEAD]:
                logger.warning("kvcomm: %s is damaged, what follows in it is not read", path)
                self._read_to[name] = 1 << 62
                return
            begin = end
            with suppress(msgspec.ValidationError):  # of a version to come
                yield self._decoder.decode(body)
        self._read_to[name] = at + begin


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
