# SPDX-License-Identifier: Apache-2.0
"""The tally: tokens by treatment, by agent and by reason. Its size does not grow with the log."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvcomm_vllm.estimate.flaws import Flaws
from kvcomm_vllm.estimate.server import Served

MOST_AGENTS = 1000
OTHERS = "(others)"


@dataclass
class Sums:
    """Prompt tokens: ``prefix_alone`` is what a server without the plugin would find in its cache;
    ``local``, ``reused`` and ``computed`` are those of one with it.
    """

    requests: int = 0
    prompt_tokens: int = 0
    prefix_alone: int = 0
    local: int = 0
    reused: int = 0
    computed: int = 0

    def add(self, served: Served) -> None:
        self.requests += 1
        self.prompt_tokens += served.prompt_tokens
        self.prefix_alone += served.prefix_alone
        self.local += served.local
        self.reused += served.reused
        self.computed += served.computed

    @property
    def computed_alone(self) -> int:
        """What a prefix cache alone leaves to compute."""
        return self.prompt_tokens - self.prefix_alone

    @property
    def ratio(self) -> float | None:
        """Tokens computed with the plugin, per token computed without; None without any."""
        return self.computed / self.computed_alone if self.computed_alone else None


@dataclass
class Copied:
    """Text in one other rendering, where it occurred first, and in how many stretches."""

    advice: str
    first_line: int
    tokens: int = 0
    stretches: int = 0


@dataclass
class Tally:
    """Args:
    losses: computed tokens by the word of their reason.
    copied: re-encoded ones by the name of the rendering.
    unsalted: requests without a ``cache_salt``.
    answers: requests whose answer the log has.
    """

    total: Sums = field(default_factory=Sums)
    agents: dict[str, Sums] = field(default_factory=dict)
    losses: Counter[str] = field(default_factory=Counter)
    copied: dict[str, Copied] = field(default_factory=dict)
    flaws: Flaws = field(default_factory=Flaws)
    unsalted: int = 0
    answers: int = 0

    def add(self, agent: str, served: Served, line: int) -> None:
        if agent not in self.agents and len(self.agents) >= MOST_AGENTS:
            agent = OTHERS
        self.agents.setdefault(agent, Sums()).add(served)
        self.total.add(served)
        for loss in served.losses:
            self.losses[str(loss.why)] += loss.tokens
            if loss.rendering is not None:
                made = Copied(loss.rendering.advice, line)
                copied = self.copied.setdefault(loss.rendering.name, made)
                copied.tokens += loss.tokens
                copied.stretches += 1

    def largest(self, most: int) -> list[tuple[str, Sums]]:
        """The agents with most tokens; those that are too many are one row, the last."""
        rows = sorted(
            self.agents.items(), key=lambda row: (row[0] == OTHERS, -row[1].prompt_tokens)
        )
        if len(rows) <= most:
            return rows
        rest = Sums()
        for _, sums in rows[most - 1 :]:
            for name, value in vars(sums).items():
                setattr(rest, name, getattr(rest, name) + value)
        return [*rows[: most - 1], (OTHERS, rest)]
