# SPDX-License-Identifier: Apache-2.0
"""A Valkey or Redis server that may be slow, full or gone at any time: who asks it never waits
long, and not again and again.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import valkey
from vllm.logger import init_logger

from kvcomm_vllm.config.address import Place

logger = init_logger("vllm.kvcomm")

ANSWER_SECONDS = 2.0  # longest silence of a server that works
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 3.0, 30.0
KEY = "kvcomm:key"


class AwayError(Exception):
    """The server does not answer, or not now."""


class Pause:
    """What is between a failure and the next attempt, longer from one to the next. One line is
    logged of the first failure and one of the end. May be used by several threads.

    Args:
        subject: of those lines.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._lock = threading.Lock()
        self._seconds = 0.0  # none while all is well
        self._until = 0.0

    @property
    def on(self) -> bool:
        return time.monotonic() < self._until

    def failed(self, error: Exception) -> None:
        with self._lock:
            if self.on:  # another thread was faster
                return
            if not self._seconds:
                logger.warning("kvcomm: %s: %s; it is tried again", self._subject, error)
            wanted = max(2 * self._seconds, FIRST_PAUSE_SECONDS)
            self._seconds = min(wanted, LONGEST_PAUSE_SECONDS)
            self._until = time.monotonic() + self._seconds

    def worked(self, began: float) -> None:
        """An attempt that began then; one from before a failure tells nothing."""
        with self._lock:
            if self._seconds and began >= self._until:
                self._seconds = 0.0
                logger.warning("kvcomm: %s: works again", self._subject)


def client_of(place: Place, seconds: float) -> valkey.Valkey:
    """A client that waits so long for an answer, and no longer."""
    return valkey.Valkey(
        host=place.host,
        port=place.port,
        db=place.db,
        password=place.password or None,
        socket_timeout=seconds,
        socket_connect_timeout=seconds,
    )


class SharedServer:
    """One of them; may be asked by several threads.

    Args:
        place: where it is.
    """

    def __init__(self, place: Place) -> None:
        self.name = place.name
        self.full = Pause(f"storing in {self.name}")
        self._away = Pause(f"the shared tier at {self.name}")
        self._closed = False
        self._client = client_of(place, ANSWER_SECONDS)

    def ask(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Replies to commands that are sent at once; those that are errors are exceptions.

        Raises:
            AwayError: there is none to some of them, or it is too early to try again.
        """
        if self._closed or self._away.on:
            raise AwayError(f"{self.name} is not asked now")
        began = time.monotonic()
        try:
            replies = self._send(commands)
        except (valkey.ValkeyError, OSError) as error:
            if not self._closed:
                self._away.failed(error)
            raise AwayError(str(error)) from error
        self._away.worked(began)
        return replies

    def _send(self, commands: tuple[tuple[Any, ...], ...]) -> list[Any]:
        with self._client.pipeline(transaction=False) as line:
            for command in commands:
                line.execute_command(*command)
            replies: list[Any] = line.execute(raise_on_error=False)
            return replies

    def refusal(self) -> str | None:
        """Why whoever asks like this will never get anything from a server that answers; nothing
        is logged.
        """
        try:
            [reply] = self._send((("GET", KEY),))
        except valkey.AuthenticationError as error:
            return str(error)
        except (valkey.ValkeyError, OSError):
            return None
        if isinstance(reply, Exception):
            return str(reply)
        return None if reply is None or _is_key(reply) else f"{KEY} there is no key of 32 bytes"

    def tenant_key(self, own: bytes) -> bytes:
        """What makes digests of tenants' salts: one key for all engines, made by the first.

        Args:
            own: the key if there is none yet.

        Raises:
            AwayError: there is no answer, or no key in it.
        """
        _, key = self.ask(("SET", KEY, own, "NX"), ("GET", KEY))
        if not _is_key(key):
            raise AwayError(f"{KEY} there is no key")
        found: bytes = key
        return found

    def close(self) -> None:
        """Whoever still asks it is refused."""
        self._closed = True


def _is_key(reply: object) -> bool:
    return isinstance(reply, bytes) and len(reply) == 32
