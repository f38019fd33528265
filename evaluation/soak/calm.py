# SPDX-License-Identifier: Apache-2.0
"""What must hold once a storm is over and nobody asks anything any more."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from kvcomm_vllm.evaluation.soak.clients import send
from kvcomm_vllm.evaluation.soak.events import EVERYTHING, PLAIN, do
from kvcomm_vllm.evaluation.soak.item import TEXT, Item, Outcome
from kvcomm_vllm.evaluation.soak.meter import Log, Reading, read
from kvcomm_vllm.evaluation.soak.options import LIMIT
from kvcomm_vllm.evaluation.soak.promises import Fault, Promise
from kvcomm_vllm.evaluation.soak.script import SALTS
from kvcomm_vllm.evaluation.soak.texts import story

PATIENCE_SECONDS = 60.0
LEARNING_SECONDS = 8.0
SPAN = 30  # tokens: what a positive control must reuse at least


class Calm:
    """Args:
    log: of the server, read up to here.
    rng: for texts that nobody has sent.
    """

    def __init__(self, base_url: str, model: str, log: Log, rng: random.Random) -> None:
        self.base_url = base_url
        self.model = model
        self.log = log
        self.rng = rng
        self.faults: list[Fault] = []

    def say(self, promise: Promise, detail: object) -> None:
        self.faults.append(Fault(promise, "", 0, str(detail)))

    def ask(self, text: str, salt: str | None = None, tokens: int = 1) -> Outcome:
        body = {"prompt": text, "max_tokens": tokens, "temperature": 0}
        return send(self.base_url, self.model, Item(0, "calm", TEXT, body, salt))

    def drained(self) -> Reading:
        """Nothing runs or waits, no page is used, and the counters balance."""
        if not _until(lambda: read(self.base_url).alive == 0):
            self.say(Promise.DRAINED, read(self.base_url).alive)
        self.ask("flush")  # what an abort has changed is told with the next step

        def balanced() -> bool:
            self.log.follow()
            return read(self.base_url).requests.total() == self.log.added

        if not _until(balanced):
            got = read(self.base_url).requests
            self.say(Promise.COUNTED, (got, self.log.added))
        if not _until(lambda: read(self.base_url).usage == 0):
            self.say(Promise.FREED, read(self.base_url).usage)
        now = read(self.base_url)
        # a prompt whose request is aborted before its first token is none of vLLM's
        beyond = now.prompt_tokens_treated - now.prompt_tokens
        if not 0 <= beyond <= now.aborted * LIMIT:
            said = f"{beyond} tokens more than vLLM's prompt tokens, {now.aborted} aborted"
            self.say(Promise.TREATED, said)
        return now

    def balanced(self, before: Reading) -> None:
        """Every token asked for since then, when nobody hung up, was treated once."""

        def even() -> bool:
            now = read(self.base_url)
            treated = now.prompt_tokens_treated - before.prompt_tokens_treated
            return treated == now.prompt_tokens - before.prompt_tokens

        if not _until(even):
            self.say(Promise.TREATED, (before, read(self.base_url)))

    def learns(self) -> None:
        """Time to learn from what was served; resets have dropped most of it."""

        def done() -> bool:
            lessons = read(self.base_url).lessons
            return lessons.total() == 2 * lessons["queued"]

        _until(done, LEARNING_SECONDS)
        if failed := read(self.base_url).lessons["failed"]:
            self.say(Promise.LEARNED, f"{failed} so far")

    def resets(self, everything: bool) -> int:
        """A reset succeeds and nothing survives it; how many were tried until one did."""
        known = story(self.rng, 150)
        self.ask(known)
        tries, path = 0, EVERYTHING if everything else PLAIN

        def done() -> bool:
            nonlocal tries
            tries += 1
            event = do(self.base_url, path)
            return event.status == 200 and event.success

        if not _until(done):
            self.say(Promise.RESET, path)
        self.forgets(known)
        return tries

    def forgets(self, text: str) -> None:
        told = self.ask(text).report
        if told.get("local") or told.get("reused"):
            self.say(Promise.FORGOTTEN, told)

    def pauses(self) -> None:
        """A pause ends, also while lessons wait for an idle moment."""
        text = story(self.rng, 150)
        self.ask("One. " + text)
        self.ask("Another one. " + text)  # reuses, and so leaves a lesson
        for mode in ("wait", "keep", "abort"):
            event = do(self.base_url, f"/pause?mode={mode}")
            if event.status != 200:
                self.say(Promise.PAUSED, (mode, event.status, event.text))
        if self.ask("and goes on").status != 200:
            self.say(Promise.PAUSED, "no answer")

    def keeps_apart(self) -> None:
        """What one salt has sent is reused by nobody else, but by itself."""
        for owner in SALTS:
            marker = story(self.rng, 150)
            self.ask(marker, owner)
            for other in SALTS:
                if other != owner:
                    told = self.ask(marker, other).report
                    if told.get("local") or told.get("reused"):
                        self.say(Promise.APART, (owner, other, told))
            told = self.ask(f"Once more: {marker}", owner).report
            if told.get("local", 0) + told.get("reused", 0) < SPAN:
                self.say(Promise.OWN, (owner, told))


def _until(true: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.25)
    return True
