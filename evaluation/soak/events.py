# SPDX-License-Identifier: Apache-2.0
"""What an operator does to a server meanwhile: resets its caches, pauses and resumes it."""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

TIMEOUT_SECONDS = 300.0
PLAIN, EVERYTHING = "/reset_prefix_cache", "/reset_prefix_cache?reset_external=true"
EVENTS = (
    (PLAIN, 0.0),
    (EVERYTHING, 0.0),
    ("/reset_prefix_cache?reset_running_requests=true", 0.0),
    ("/reset_prefix_cache?reset_running_requests=true&reset_external=true", 0.0),
    ("/pause?mode=keep", 1.0),
    ("/pause?mode=keep&clear_cache=false", 0.2),
    ("/pause?mode=wait", 0.5),
    ("/pause?mode=abort", 0.5),
)


@dataclass(frozen=True)
class Event:
    """What was done and answered; ``success`` is a reset's own word, True for the others."""

    path: str
    status: int
    success: bool
    began: float
    ended: float
    text: str = ""

    @property
    def aborts(self) -> bool:
        """Whether it ends the requests that are under way."""
        return "abort" in self.path


def post(base_url: str, path: str) -> tuple[int, str]:
    """Status and body; status 0 if nothing is answered in time."""
    try:
        request = urllib.request.Request(base_url + path, method="POST")
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode(errors="replace")
    except OSError as broken:
        return 0, str(broken)


def do(base_url: str, path: str, rest: float = 0.0) -> Event:
    """Do it; what was paused is resumed after ``rest`` seconds, whatever the answer was."""
    began = time.monotonic()
    status, text = post(base_url, path)
    if path.startswith("/pause"):
        time.sleep(rest)
        resumed, _ = post(base_url, "/resume")
        status = status if status != 200 else resumed
    success = True
    if status == 200 and path.startswith(PLAIN):
        success = bool(json.loads(text)["success"])
    return Event(path, status, success, began, time.monotonic(), text)


def trouble(base_url: str, rng: random.Random, seconds: float, gap: float) -> list[Event]:
    """Events one after the other, ``gap`` seconds apart on average, for that time."""
    end = time.monotonic() + seconds
    events: list[Event] = []
    while True:
        time.sleep(rng.uniform(0.5 * gap, 1.5 * gap))
        if time.monotonic() > end:
            return events
        events.append(do(base_url, *rng.choice(EVENTS)))
