# SPDX-License-Identifier: Apache-2.0
"""Prompt tokens by treatment, read from the server's /metrics page."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvcomm_vllm.cli.metrics_page import read_page, totals

COUNTER = "vllm:kvcomm_tokens_total"
REASONS = "vllm:kvcomm_reasons_total"
LESSONS = "vllm:kvcomm_lessons_total"
SETTLE_SECONDS = 3.0
LESSON_SECONDS = 60.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Treatment:
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

    def __sub__(self, other: "Treatment") -> "Treatment":
        more = {
            reason: count - other.declined.get(reason, 0) for reason, count in self.declined.items()
        }
        return Treatment(
            self.local - other.local,
            self.reused - other.reused,
            self.computed - other.computed,
            self.corrected - other.corrected,
            {reason: count for reason, count in sorted(more.items()) if count},
        )


def parse(page: str) -> Treatment | None:
    """Sum the counters over their other labels; None if the page does not have them."""
    counts = totals(page, COUNTER, "treatment")
    if not counts:
        return None
    local, reused, computed, corrected = (
        int(counts.get(name, 0.0)) for name in ("local", "reused", "computed", "corrected")
    )
    declined = {reason: int(count) for reason, count in totals(page, REASONS, "reason").items()}
    return Treatment(local, reused, computed, corrected, declined)


def lessons_waiting(page: str) -> int:
    """Prompts that the server is yet to learn anchors from, when it has nothing else to do."""
    counts = totals(page, LESSONS, "outcome")
    over = sum(count for outcome, count in counts.items() if outcome != "queued")
    return int(counts.get("queued", 0.0) - over)


class TreatmentMeter:
    """Differences of the counters around requests that are sent one after the other."""

    def __init__(self, base_url: str) -> None:
        self._url = base_url
        self._last = self._read()

    def _read(self) -> Treatment | None:
        page = read_page(self._url)
        return parse(page) if page is not None else None

    def take(self, prompt_tokens: int) -> Treatment | None:
        """Tokens by treatment since the last call; None where the server does not count them.

        vLLM publishes the counts of a step shortly after its tokens, so this waits until the
        prompt's tokens are all accounted for.
        """
        before = self._last or Treatment()
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            now = self._read()
            done = now is not None and (now - before).total >= prompt_tokens
            if done or time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        self._last = now
        return now - before if now is not None else None

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
