# SPDX-License-Identifier: Apache-2.0
"""Manifests: by what text is found whose pages lie in slower tiers, after a restart and by other
engines. A record is a stored sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec
import numpy as np
import xxhash

from kvcomm_vllm.scheduler.index import I32, Origin, Sequence

DIGEST = 8  # bytes before a record


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


class Manifests(Protocol):
    """What engines write down for each other.

    Attributes:
        secret: of tenants' digests in there.
    """

    secret: bytes

    def append(self, sequence: Sequence) -> None:
        """Write a sequence down. What cannot be written costs no more than that it is not found
        again.
        """

    def news(self) -> Iterator[Record]:
        """What others have written since this was last asked, the oldest first."""

    def close(self) -> None:
        """No more is written or asked for."""


class DamagedError(ValueError):
    """Not what was written."""


_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Record)


def packed(sequence: Sequence) -> bytes:
    """A record of it, with its digest before it."""
    body = _encoder.encode(Record.of(sequence))
    return xxhash.xxh3_64_digest(body) + body


def unpacked(data: bytes) -> Record | None:
    """The record in it; None if it is of a version to come.

    Raises:
        DamagedError: the digest is another one.
    """
    body = data[DIGEST:]
    if xxhash.xxh3_64_digest(body) != data[:DIGEST]:
        raise DamagedError
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError:
        return None
