# SPDX-License-Identifier: Apache-2.0
"""Server-sent events as their bytes pass: something may be put into the JSON of one, and nothing is
held back, lost or changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable

END = b"\n\n"
MOST_BYTES = 1 << 16  # kept of an event that comes in pieces; with more it passes as it is


class Events:
    """The events of one response.

    Args:
        addition: what goes behind the last member of an event's JSON object, as
            ``,"name":value``; nothing for most.
    """

    def __init__(self, addition: Callable[[dict[str, object]], bytes]) -> None:
        self._addition = addition
        self._begun: bytes | None = b""  # of the event that is passing; None: too much, or unknown

    def follow(self, body: bytes) -> None:
        """These bytes pass, and nothing is to be put into them."""
        end = body.rfind(END)
        if end >= 0:
            self._keep(body[end + len(END) :])
        elif self._begun is not None:
            self._keep((self._begun + body).rpartition(END)[2])

    def passing(self, body: bytes) -> bytes:
        """These bytes, with what is put into events whose JSON ends in them."""
        out, rest = [], body
        while rest:
            if self._begun is None:
                end = rest.find(END)
                if end < 0:
                    break
                self._begun = b""
                passed = end + len(END)
                out.append(rest[:passed])
            else:
                event = self._begun + rest
                end = event.find(END)
                if end < 0:
                    self._keep(event)
                    break
                gone, self._begun = len(self._begun), b""
                passed = end + len(END) - gone
                place, added = self._added(event[:end])
                place -= gone
                if added and place >= 0:  # else its end has gone out already
                    out += [rest[:place], added, rest[place:passed]]
                else:
                    out.append(rest[:passed])
            rest = rest[passed:]
        return b"".join([*out, rest])

    def _keep(self, begun: bytes) -> None:
        self._begun = begun if len(begun) <= MOST_BYTES else None

    def _added(self, event: bytes) -> tuple[int, bytes]:
        """Where in an event something is added, and what."""
        start = event.rfind(b"\n") + 1
        *before, last = event.split(b"\n")
        if not last.startswith(b"data:") or any(line.startswith(b"data") for line in before):
            return 0, b""
        text = last.removeprefix(b"data:").strip()
        if not (text.startswith(b"{") and text.endswith(b"}")):
            return 0, b""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return 0, b""
        added = self._addition(content) if content else b""
        return start + last.rfind(b"}"), added
