# SPDX-License-Identifier: Apache-2.0
"""Addresses of servers, with passwords that are never printed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

FORM = "valkey://[:password@]host:port[/db], also redis://"


@dataclass(frozen=True)
class Place:
    """Where a server is.

    Args:
        password: empty where none is asked for.
        db: number of the database in it.
    """

    host: str
    port: int
    password: str
    db: int

    @property
    def name(self) -> str:
        """It without its password."""
        return f"{self.host}:{self.port}/{self.db}"


class Address(str):
    """A URL as it was given. Whoever prints it, vLLM's log of its arguments included, gets it
    without the password.
    """

    __slots__ = ()

    def __new__(cls, url: str) -> Self:
        return super().__new__(cls, url[:])  # of an address all of it

    def __str__(self) -> str:
        scheme = "".join(re.findall(r"^[a-z]+://", self))
        _, at, rest = self[len(scheme) :].rpartition("@")
        # one that is not in order may have it anywhere
        rest = re.sub(r"^:.*|[?#].*", "***", rest, flags=re.DOTALL)
        return f"{scheme}{'***@' if at else ''}{rest}"

    def __repr__(self) -> str:
        return repr(str(self))

    def place(self) -> Place:
        """What it says.

        Raises:
            ValueError: it is no such address.
        """
        url = urlsplit(self)
        db = url.path.removeprefix("/") or "0"
        if not _in_order(url) or not re.fullmatch(r"[0-9]{1,5}", db):
            raise ValueError(f"not of the form {FORM}")
        assert url.hostname is not None
        assert url.port is not None
        return Place(url.hostname, url.port, unquote(url.password or ""), int(db))


def _in_order(url: SplitResult) -> bool:
    """Raises:
    ValueError: the port is no number.
    """
    return (
        url.scheme in ("valkey", "redis")
        and bool(url.hostname and url.port)
        and not (url.username or url.query or url.fragment)
    )
