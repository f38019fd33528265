# SPDX-License-Identifier: Apache-2.0
"""Prompt tokens by treatment, read from the server's /metrics page."""

import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

COUNTER = "vllm:kvcomm_tokens_total"
SETTLE_SECONDS = 3.0


@dataclass(frozen=True)
class Treatment:
    """Prompt tokens that were local hits, reused from another request, or computed."""

    local: int = 0
    reused: int = 0
    computed: int = 0

    @property
    def total(self) -> int:
        return self.local + self.reused + self.computed

    def __sub__(self, other: "Treatment") -> "Treatment":
        return Treatment(
            self.local - other.local, self.reused - other.reused, self.computed - other.computed
        )


def parse(page: str) -> Treatment | None:
    """Sum the counter over its other labels; None if the page does not have it."""
    counts: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == COUNTER:
                treatment = sample.labels.get("treatment", "")
                counts[treatment] = counts.get(treatment, 0.0) + sample.value
    if not counts:
        return None
    return Treatment(*(int(counts.get(key, 0.0)) for key in ("local", "reused", "computed")))


class TreatmentMeter:
    """Differences of the counter around requests that are sent one after the other."""

    def __init__(self, base_url: str) -> None:
        self._url = f"{base_url}/metrics"
        self._last = self._read()

    def _read(self) -> Treatment | None:
        try:
            with urllib.request.urlopen(self._url, timeout=10) as answer:
                return parse(answer.read().decode())
        except (urllib.error.URLError, OSError):
            return None

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
            time.sleep(0.05)
        self._last = now
        return now - before if now is not None else None
