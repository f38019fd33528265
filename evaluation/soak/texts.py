# SPDX-License-Identifier: Apache-2.0
"""What the agents of a soak read and say: documents by tenant, roles, histories that change."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

Messages = list[dict[str, str]]

WORDS = (
    *("river", "stone", "amber", "candle", "market", "winter", "engine", "paper", "garden"),
    *("silver", "bridge", "mountain", "signal", "copper", "harbour", "letter", "window"),
    *("forest", "teacher", "barrel", "lantern", "meadow", "pocket", "railway", "salt", "ticket"),
    *("umbrella", "valley", "wagon", "yellow", "anchor", "button", "cotton", "drawer", "early"),
    *("figure", "gentle", "hollow", "island", "jacket", "kitchen", "ladder", "mirror", "needle"),
)
ROLES = ("planner", "writer", "critic", "judge", "coder", "tester", "editor", "clerk")
SHELF = 4  # documents a tenant's agents share at a time
HISTORIES = 3
MOST_WORDS = 500  # of a history
LENGTHS = (30, 60, 100, 150, 220)  # words


def story(rng: random.Random, words: int) -> str:
    """Sentences of random words: no two stories share a sentence."""
    said: list[str] = []
    while words > 0:
        count = min(words, rng.randint(6, 14))
        said.append(" ".join(rng.choice(WORDS) for _ in range(count)).capitalize() + ".")
        words -= count
    return " ".join(said)


@dataclass(frozen=True)
class Letter:
    """A text, and the salts of those who have sent it as a prompt."""

    text: str
    readers: set[str | None]


class Tenant:
    """The documents and conversations of all clients with one salt; nobody else has them.

    ``letters`` are shared: texts that one tenant has sent, for another to send as well.
    """

    def __init__(self, rng: random.Random, salt: str | None, letters: list[Letter]) -> None:
        self.salt = salt
        self._rng = rng
        self._letters = letters
        self._roles = {role: f"You are the {role}. {story(rng, 30)}" for role in ROLES}
        self._shelf = deque((self._new() for _ in range(SHELF)), maxlen=SHELF)
        self._histories: list[Messages] = [[] for _ in range(HISTORIES)]

    def _new(self) -> str:
        return story(self._rng, self._rng.choice(LENGTHS))

    def documents(self, count: int) -> list[str]:
        """Some that were mostly read before, in any order; now and then a new one comes."""
        if self._rng.random() < 0.15:
            self._shelf.append(self._new())
        return self._rng.sample(list(self._shelf), count)

    def letter(self) -> str:
        """A text of its own that others may come to send."""
        self._letters.append(Letter(story(self._rng, 120), {self.salt}))
        return self._letters[-1].text

    def letter_of_another(self) -> str:
        """A text that others have sent, but this tenant has not; a new one if there is none."""
        for letter in reversed(self._letters):
            if self.salt not in letter.readers:
                letter.readers.add(self.salt)
                return letter.text
        return self.letter()

    def chat(self, documents: Sequence[str], question: str) -> Messages:
        """An agent of some role asks about documents."""
        system = self._roles[self._rng.choice(ROLES)]
        quoted = "\n\n".join(documents)
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": f"{quoted}\n\n{question}"},
        ]

    def conversation(self) -> Messages:
        """A history one turn longer than it was: trimmed at its head or edited, sometimes."""
        history = self._rng.choice(self._histories)
        if len(history) > 4 and self._rng.random() < 0.2:
            del history[: 2 * self._rng.randint(1, 2)]
        while sum(message["content"].count(" ") for message in history) > MOST_WORDS:
            del history[:2]
        if history and self._rng.random() < 0.2:
            edited = self._rng.randrange(len(history))
            history[edited] = {**history[edited], "content": story(self._rng, 20)}
        if len(history) % 2:
            history.append({"role": "assistant", "content": story(self._rng, 25)})
        text = self.documents(1)[0] if self._rng.random() < 0.3 else story(self._rng, 30)
        history.append({"role": "user", "content": text})
        system = {"role": "system", "content": self._roles["clerk"]}
        return [system, *({**message} for message in history)]
