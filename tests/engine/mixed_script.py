# SPDX-License-Identifier: Apache-2.0
"""Batches of requests as agents send them: they quote, edit, go on and try again; some in between
must be exact. The same seed gives the same script, as far as answers are the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engines import text

MOST_AT_ONCE = 6
LONGEST = 900  # tokens of a prompt
EXACT_SHARE = 0.25
SALTS = (None, None, None, "one tenant", "another tenant")
KEPT = 40  # served requests that may be edited, gone on with or tried again


@dataclass(frozen=True)
class Asked:
    """One request; ``adapter``: its number among those there are, None is none."""

    prompt: list[int]
    exact: bool
    salt: str | None
    adapter: int | None
    tokens: int


@dataclass
class Script:
    """Makes batches, and remembers what was answered.

    Args:
        seed: of everything.
        adapters: how many there are to choose from.
    """

    seed: int
    adapters: int = 0
    _served: list[tuple[Asked, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)
        self._texts = [text(self.seed + i, self._draw.randint(30, 220)) for i in range(14)]

    def batch(self) -> list[Asked]:
        """What is sent at once: one kind of prompt after the other, by chance."""
        return [self._request() for _ in range(self._draw.randint(1, MOST_AT_ONCE))]

    def answered(self, asked: Sequence[Asked], answers: Sequence[list[int]]) -> None:
        self._served += zip(asked, answers, strict=True)
        del self._served[:-KEPT]

    def _request(self) -> Asked:
        kinds = [self._quoting, self._quoting]
        if self._served:
            kinds += [self._edited, self._next_turn, self._again]
        request = self._draw.choice(kinds)()
        exact = self._draw.random() < EXACT_SHARE
        return replace(
            request,
            prompt=request.prompt[:LONGEST],
            exact=exact,
            tokens=self._draw.choice((1, 4, 8, 40)),
        )

    def _quoting(self) -> Asked:
        prompt = self._own(10, 90)
        for quoted in self._draw.sample(self._texts, self._draw.randint(1, 3)):
            prompt += quoted + self._own(1, 30)
        number = self._draw.randrange(-1, self.adapters)
        adapter = None if number < 0 else number
        return Asked(prompt, False, self._draw.choice(SALTS), adapter, 1)

    def _edited(self) -> Asked:
        """A few tokens near its head are others, more or less."""
        request, _ = self._draw.choice(self._served)
        place = self._draw.randrange(min(60, len(request.prompt)))
        gone = self._draw.randint(0, 12)
        prompt = request.prompt[:place] + self._own(0, 12) + request.prompt[place + gone :]
        return replace(request, prompt=prompt)

    def _next_turn(self) -> Asked:
        request, answer = self._draw.choice(self._served)
        return replace(request, prompt=request.prompt + answer + self._own(1, 40))

    def _again(self) -> Asked:
        return self._draw.choice(self._served)[0]

    def _own(self, least: int, most: int) -> list[int]:
        return text(self._draw.randrange(1 << 40), self._draw.randint(least, most))
