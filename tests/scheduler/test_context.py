# SPDX-License-Identifier: Apache-2.0
"""How much of its new context a source has seen: none, all, or what another order left of it."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_strategies import source

from kvcomm_vllm.scheduler.context import GRAM, Context
from kvcomm_vllm.scheduler.index.sequence import Sequence
from kvcomm_vllm.scheduler.spans import ReuseSpan

rng = np.random.default_rng(0)


def text(length: int) -> list[int]:
    return [int(t) for t in rng.integers(0, 50_000, length)]


def stored(tokens: list[int]) -> Sequence:
    return Sequence(0, b"", np.array(tokens, np.int32), [], len(tokens), None, True, "owner")


def span(of: Sequence, at: int, start: int, length: int, lead: int = 0) -> ReuseSpan:
    return ReuseSpan(at, at + length, 0, source(at, length, start, of=of, lead=lead))


def share(prompt: list[int], spans: list[ReuseSpan], borders: int | None = None) -> float:
    return Context(np.array(prompt, np.int32), borders).unseen_share(spans)


ONE, OTHER = text(60), text(60)


def test_a_document_behind_other_instructions_has_seen_nearly_all() -> None:
    document = text(1000)
    moved = span(stored([*ONE, *document]), 60, 60, 1000)
    assert 0.1 < share([*OTHER, *document, 1], [moved]) < 0.2


@pytest.mark.parametrize("borders", [None, 16])
def test_messages_that_were_computed_apart_have_seen_little(borders: int | None) -> None:
    messages = [text(45) for _ in range(24)]
    prompt = [*OTHER, *chain(*messages)]
    spans = [
        span(stored([*ONE, *message]), 60 + 45 * n, 60, 45) for n, message in enumerate(messages)
    ]
    assert share(prompt, spans, borders) > 0.85


def test_in_another_order_about_half_is_seen() -> None:
    messages = [text(45) for _ in range(24)]
    together = stored([*ONE, *chain(*messages)])
    order = [int(n) for n in rng.permutation(24)]
    prompt = [*OTHER, *chain(*(messages[n] for n in order))]
    spans = [span(together, 60 + 45 * at, 60 + 45 * n, 45) for at, n in enumerate(order)]
    assert 0.35 < share(prompt, spans) < 0.75


def test_the_same_context_is_seen() -> None:
    tokens = text(200)
    own = ReuseSpan(100, 200, 0, source(100, 100, 100, same_context=True, of=stored(tokens)))
    assert share(tokens, [own]) == 0.0


def test_long_instructions_of_ones_own_are_unseen() -> None:
    document = text(1000)
    short = span(stored([*ONE, *document]), 2500, 60, 1000)
    assert share([*text(2500), *document], [short]) > 0.8


@given(st.integers(0, 2**32), st.integers(0, 90), st.integers(0, 40))
@settings(deadline=None)
def test_seen_is_what_a_loop_finds(seed: int, before: int, earlier: int) -> None:
    random = np.random.default_rng(seed)
    prompt = [int(t) for t in random.integers(0, 2, before)]
    context = [int(t) for t in random.integers(0, 2, earlier)]
    grams = {tuple(context[i : i + GRAM]) for i in range(len(context) - GRAM + 1)}
    seen = set()
    for i in range(before - GRAM + 1):
        if tuple(prompt[i : i + GRAM]) in grams:
            seen.update(range(i, i + GRAM))
    message = [7] * 20
    moved = span(stored([*context, *message]), before, earlier, 20)
    at = max(before, 1)
    wanted = (before - len(seen)) * np.log((before + 20) / at) / 20
    assert share([*prompt, *message], [moved]) == pytest.approx(wanted)
