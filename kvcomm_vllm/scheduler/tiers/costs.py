# SPDX-License-Identifier: Apache-2.0
"""What it costs to bring pages back, and to compute them instead, as measured on this engine."""

from __future__ import annotations

WEIGHT = 0.2  # of the newest measurement in a mean
FEWEST_TOKENS = 64  # computed in a step from which a token's time is told
FEWEST_PAGES = 4  # likewise: with fewer, what is measured is how long a step takes
TRIED_AGAIN = 64  # each so manieth time that something is not worth it
MOST_SECONDS = 10.0  # a step that took longer was not a step


class Mean:
    """One that forgets; None before the first measurement."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, seconds: float) -> None:
        known = seconds if self.value is None else self.value
        self.value = known + WEIGHT * (seconds - known)


class Costs:
    """Seconds per token computed, and per page brought back: from the host pool, or from behind it.

    As long as one of them is not known, bringing back counts as cheaper: so it is learned.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._token, self._pool, self._behind = Mean(), Mean(), Mean()
        self._refused = 0
        self._step: tuple[float, int] | None = None

    def step(self, now: float, tokens: int, goes_on: bool) -> None:
        """A step begins, which computes so many tokens; ``goes_on``: it follows the one before, as
        requests are left.
        """
        if self._step is not None and goes_on:
            began, computed = self._step
            if computed >= FEWEST_TOKENS and now - began < MOST_SECONDS:
                self._token.add((now - began) / computed)
        self._step = now, tokens

    def brought(self, pages: int, seconds: float, behind: bool) -> None:
        """So many pages have come back; ``behind``: from a tier behind the pool."""
        if pages >= FEWEST_PAGES:
            (self._behind if behind else self._pool).add(seconds / pages)

    def worth(self, behind: bool) -> bool:
        """Whether a page is brought back sooner than it is computed; now and then it is even if it
        is not, since that may have changed.
        """
        page, token = (self._behind if behind else self._pool).value, self._token.value
        if page is None or token is None or page < token * self._block_size:
            return True
        self._refused += 1
        return self._refused % TRIED_AGAIN == 0
