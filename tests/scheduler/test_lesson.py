# SPDX-License-Identifier: Apache-2.0
"""A lesson teaches what it has computed, however often it starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from kvcomm_vllm.scheduler.idle.lesson import Lesson, TaughtSpan
from kvcomm_vllm.scheduler.spans import Source

SIZE = 4


def span(start: int, length: int) -> TaughtSpan:
    sequence: Any = SimpleNamespace()
    return TaughtSpan(
        f"placeholder {start}", start, (Source(sequence, 0, start, length, [1], 0, False),)
    )


class Pages:
    """Of the spans ``there`` the sources can be found, and no page of the prompt itself."""

    block_size = SIZE
    there: tuple[int, ...] = ()

    def sources(self, match: Any, tokens: Any) -> list[Source]:
        start, length = match.prompt_start, match.length
        found = Source(match.sequence, 0, start, length, [1], 0, False)
        return [found] if start in self.there else []

    def cached(self, hashes: list[bytes]) -> dict[int, int]:
        return {}

    def hold(self, *args: Any, **options: Any) -> bool:
        return True

    def hold_scratch(self, holder: str, count: int) -> list[int]:
        return list(range(count))

    def release(self, holder: str) -> None:
        pass


def test_a_second_start_with_more_sources_computes_all_that_they_need() -> None:
    teacher: Any = SimpleNamespace(assign=lambda lesson, op: None)
    spans = [span(2, 6), span(10, 6)]
    lesson = Lesson(teacher, 0, np.arange(16, dtype=np.int32), [], spans)
    pages: Any = Pages()
    for there, end in (((2,), 8), ((2, 10), 16)):
        pages.there = there
        assert lesson.start(pages)
        computed: list[int] = []
        while (op := lesson.next_op(5)).hole is not None:
            computed += op.hole.tokens
        assert computed == list(range(end))
