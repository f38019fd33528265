# SPDX-License-Identifier: Apache-2.0
"""What tiers have brought back into the KV cache for one request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Promoted:
    """``pages`` were brought back within ``seconds`` since they were asked for; ``slower``: some
    came from behind the host pool.
    """

    pages: int = 0
    seconds: float = 0.0
    slower: bool = False

    def add(self, pages: int, seconds: float, slower: bool) -> None:
        self.pages += pages
        self.seconds += seconds
        self.slower |= slower

    def told(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 4)}
