# SPDX-License-Identifier: Apache-2.0
"""What a server with the plugin counts: prompt tokens by what was done with them, reasons, lessons.

Whoever sends requests knows nothing of how a server works; a :class:`Meter` may.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, Protocol

from kvcomm_vllm.evaluation.serving.metrics_page import read_page, totals

TOKENS = "vllm:kvcomm_tokens_total"
REASONS = "vllm:kvcomm_reasons_total"
LESSONS = "vllm:kvcomm_lessons_total"
# Prompt tokens that were local hits, reused from another request, or computed; `corrected` is the
# part of `reused` that anchors corrected.
TREATMENTS = ("local", "reused", "computed", "corrected")
SETTLE_SECONDS = 3.0
LESSON_SECONDS = 60.0
POLL_SECONDS = 0.05


def counted(page: str, name: str, label: str) -> Counter[str]:
    """A counter by one of its labels, summed over the others; empty if the page lacks it."""
    return Counter({key: int(value) for key, value in totals(page, name, label).items()})


def lessons_waiting(page: str) -> int:
    """Prompts that the server is yet to learn anchors from, when it has nothing else to do."""
    counts = counted(page, LESSONS, "outcome")
    return 2 * counts["queued"] - counts.total()


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
        self._tokens, self._reasons = self._read()

    def _read(self) -> tuple[Counter[str], Counter[str]]:
        page = read_page(self._url) or ""
        return counted(page, TOKENS, "treatment"), counted(page, REASONS, "reason")

    def take(self, prompt_tokens: int) -> dict[str, Any]:
        """Tokens by treatment and reasons since the last call; nothing where the server does not
        count.

        vLLM publishes the counts of a step shortly after its tokens, so this waits until the
        prompt's tokens are all accounted for.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            tokens, reasons = self._read()
            new, declined = tokens - self._tokens, sorted((reasons - self._reasons).items())
            if tokens and sum(new[name] for name in TREATMENTS[:3]) >= prompt_tokens:
                break
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        self._tokens, self._reasons = tokens, reasons
        if not tokens:
            return {}
        return {**{name: new[name] for name in TREATMENTS}, "declined": dict(declined)}

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
