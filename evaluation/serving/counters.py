# SPDX-License-Identifier: Apache-2.0
"""What a server with the plugin counts: prompt tokens by what was done with them, reasons, lessons.

Whoever sends requests knows nothing of how a server works; a :class:`Meter` may.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from kvcomm_vllm.evaluation.serving.metrics_page import read_page, totals

COUNTER = "vllm:kvcomm_tokens_total"
REASONS = "vllm:kvcomm_reasons_total"
LESSONS = "vllm:kvcomm_lessons_total"
SETTLE_SECONDS = 3.0
LESSON_SECONDS = 60.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Counts:
    """Prompt tokens that were local hits, reused from another request, or computed.

    `corrected` is the part of `reused` that anchors corrected; `declined` counts the reasons for
    which requests were not reused.
    """

    local: int = 0
    reused: int = 0
    computed: int = 0
    corrected: int = 0
    declined: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.local + self.reused + self.computed

    def __sub__(self, other: Counts) -> Counts:
        more = {
            reason: count - other.declined.get(reason, 0) for reason, count in self.declined.items()
        }
        return Counts(
            self.local - other.local,
            self.reused - other.reused,
            self.computed - other.computed,
            self.corrected - other.corrected,
            {reason: count for reason, count in sorted(more.items()) if count},
        )


def parse(page: str) -> Counts | None:
    """Sum the counters over their other labels; None if the page does not have them."""
    counts = totals(page, COUNTER, "treatment")
    if not counts:
        return None
    names = ("local", "reused", "computed", "corrected")
    declined = {reason: int(count) for reason, count in totals(page, REASONS, "reason").items()}
    local, reused, computed, corrected = (int(counts.get(name, 0.0)) for name in names)
    return Counts(local, reused, computed, corrected, declined)


def lessons_waiting(page: str) -> int:
    """Prompts that the server is yet to learn anchors from, when it has nothing else to do."""
    counts = totals(page, LESSONS, "outcome")
    over = sum(count for outcome, count in counts.items() if outcome != "queued")
    return int(counts.get("queued", 0.0) - over)


class Meter(Protocol):
    """What a driver may be given to look at its server with, between two requests."""

    def settle(self) -> bool:
        """Wait until the server has done what it does after an answer; False if it takes too long,
        and what comes then depends on time.
        """

    def take(self, prompt_tokens: int) -> dict[str, Any]:
        """Fields of the record of the request that has just ended."""


class KVCommMeter:
    """Differences of the counters around requests that are sent one after the other.

    All columns of a server share one, as they share its counters.
    """

    def __init__(self, base_url: str) -> None:
        self._url = base_url
        self._last = self._read()

    def _read(self) -> Counts | None:
        page = read_page(self._url)
        return parse(page) if page is not None else None

    def counts(self, prompt_tokens: int) -> Counts | None:
        """Since the last call; None where the server does not count.

        vLLM publishes the counts of a step shortly after its tokens, so this waits until the
        prompt's tokens are all accounted for.
        """
        before = self._last or Counts()
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            now = self._read()
            done = now is not None and (now - before).total >= prompt_tokens
            if done or time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        self._last = now
        return now - before if now is not None else None

    def take(self, prompt_tokens: int) -> dict[str, Any]:
        found = self.counts(prompt_tokens)
        return {one.name: getattr(found, one.name) for one in fields(Counts)} if found else {}

    def settle(self, limit: float = LESSON_SECONDS) -> bool:
        """Wait until the server has learned from all it was asked so far, `limit` seconds at most;
        whether it has.
        """
        deadline = time.monotonic() + limit
        while True:
            page = read_page(self._url)
            if page is None or lessons_waiting(page) <= 0:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
