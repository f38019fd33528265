# SPDX-License-Identifier: Apache-2.0
"""Texts for the tests: words of random tokens, and prompts made of them."""

from __future__ import annotations

import random

VOCABULARY = range(3, 500)


def words(seed: object, count: int) -> list[int]:
    """``count`` tokens that depend on ``seed`` alone; two seeds share no run that matters."""
    source = random.Random(repr(seed))
    return [source.choice(VOCABULARY) for _ in range(count)]
