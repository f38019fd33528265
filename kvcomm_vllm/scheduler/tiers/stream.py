# SPDX-License-Identifier: Apache-2.0
"""Manifests in a stream of the server that has the pages. A thread writes and reads it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from kvcomm_vllm.scheduler.index import Sequence
from kvcomm_vllm.scheduler.tiers.manifests import DamagedError, Record, packed, unpacked
from kvcomm_vllm.scheduler.tiers.server import AwayError, SharedServer

LOOK_SECONDS = 1.0  # between two looks at what others have written
MOST_RECORDS = 10_000  # in the stream, about; and of what has been read and not asked for
AT_ONCE = 100  # records


class StreamManifests:
    """Those of one model and layout.

    Args:
        prefix: of the stream's name.
        ttl_seconds: how long the stream stays after the last record.
        key: the tenants' key, if the server has none.

    Attributes:
        secret: the tenants' key. Another one once the server, which may be late, has told it: what
            was written down before is found by nobody.
    """

    def __init__(self, server: SharedServer, prefix: str, ttl_seconds: int, key: bytes) -> None:
        self.secret = key
        self._server = server
        self._stream = f"{prefix}manifests"
        self._ttl = ttl_seconds
        self._own = os.urandom(16)  # by which its records are told from others'
        self._unsent: deque[bytes] = deque(maxlen=MOST_RECORDS)
        self._unread: deque[Record] = deque(maxlen=MOST_RECORDS)
        self._last = b"0"
        self._wake, self._looked = threading.Event(), threading.Event()
        self._closed = False
        self._thread = threading.Thread(
            target=self._run, name="kvcomm_valkey_manifests", daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Until what there was at the start has been read, but no longer."""
        self._looked.wait(seconds)

    def append(self, sequence: Sequence) -> None:
        self._unsent.append(packed(sequence))
        self._wake.set()

    def news(self) -> Iterator[Record]:
        while self._unread:
            yield self._unread.popleft()

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join()

    # ---- in the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            with suppress(AwayError):
                self._agree()
                self._send()
                self._receive()
            self._looked.set()
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()
        with suppress(AwayError):
            self._send()

    def _agree(self) -> None:
        key = self._server.tenant_key(self.secret)
        if key != self.secret:
            self.secret = key
            self._unsent.clear()

    def _send(self) -> None:
        """What is not answered is sent again: of a record that comes twice one is kept."""
        while self._unsent:
            count = min(AT_ONCE, len(self._unsent))
            records = [self._unsent.popleft() for _ in range(count)]
            head = ("XADD", self._stream, "MAXLEN", "~", MOST_RECORDS, "*")
            adding = ((*head, "from", self._own, "record", record) for record in records)
            try:
                self._server.ask(*adding, ("EXPIRE", self._stream, self._ttl))
            except AwayError:
                self._unsent.extendleft(reversed(records))
                raise

    def _receive(self) -> None:
        asked = ("XREAD", "COUNT", AT_ONCE, "STREAMS", self._stream)
        while not self._closed:
            [reply] = self._server.ask((*asked, self._last))
            # of another kind, if there is something else by this name
            entries = reply[0][1] if isinstance(reply, list) and reply else []
            for self._last, fields in entries:
                self._take(fields)
            if len(entries) < AT_ONCE:
                return

    def _take(self, fields: dict[bytes, Any]) -> None:
        if fields.get(b"from") == self._own:
            return
        with suppress(DamagedError):
            record = unpacked(fields.get(b"record", b""))
            if record is not None:
                self._unread.append(record)
