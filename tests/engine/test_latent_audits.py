# SPDX-License-Identifier: Apache-2.0
"""MLA on a real engine that finds out in idle time how far its answers were from exact ones, and
makes exact what it has served.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engines import Answer, ask, settle, text
from latent_platform import PAGE, plain_deepseek, reusing_deepseek
from since import since
from test_comparison import OFF, VOCABULARY, Heard, kl
from tiny_families import MLA_ON_CPU
from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.slow, since(*MLA_ON_CPU)]

SHARED = text(601, 200)


@pytest.fixture(scope="module")
def truth(tiny_deepseek: str) -> Iterator[LLM]:
    with plain_deepseek(tiny_deepseek) as llm:
        yield llm


@pytest.fixture(scope="module")
def audited(tiny_deepseek: str) -> Iterator[LLM]:
    """As soon as it is idle; rows are moved as they are."""
    plugin = {"mode": "rotate", "audit_idle_seconds": 0, "audit_share": 1}
    with reusing_deepseek(tiny_deepseek, plugin, max_logprobs=VOCABULARY) as llm:
        yield llm


def reuse(llm: LLM, seed: int, tail: int) -> tuple[list[int], Answer]:
    """Two agents read SHARED, the second one approximately: its prompt and its answer."""
    ask(llm, text(seed, 70) + SHARED + text(seed + 1, 5), hints=OFF)
    settle(llm)
    prompt = text(seed + 2, 70) + SHARED + text(seed + 3, tail)
    (answer,) = ask(llm, prompt, tokens=20, logprobs=VOCABULARY)
    assert answer.report["reused"] > 150
    return prompt, answer


@pytest.mark.parametrize("tail", [15, 19])
def test_a_comparison_is_the_distance_of_what_was_served_from_what_is_exact(
    audited: LLM, truth: LLM, heard: Heard, tail: int
) -> None:
    """Its last token alone is computed behind rows that are exact, and rows that were moved."""
    prompt, served = reuse(audited, 610 + 10 * tail, tail)
    heard.clear()
    settle(audited)
    ((_, found),) = heard
    assert audited.reset_prefix_cache()
    (exact,) = ask(audited, prompt, tokens=1, logprobs=VOCABULARY, hints=OFF)
    assert exact.tokens == ask(truth, prompt, tokens=1)[0].tokens
    wanted = kl(exact.logprobs[0], served.logprobs[0])
    assert wanted > 1e-5, "there is something to be found"
    assert found.kl == pytest.approx(wanted, rel=0.01, abs=1e-6)


def test_what_was_served_becomes_exact(audited: LLM, truth: LLM) -> None:
    prompt, answer = reuse(audited, 520, 15)
    settle(audited)
    turn = prompt + answer.tokens + text(525, 12)
    (follow_up,) = ask(audited, turn, tokens=12)
    stored = len(prompt) + len(answer.tokens) - 1
    assert follow_up.report["local"] >= stored // PAGE * PAGE
    assert follow_up.report["local_approximate"] == 0
    assert follow_up.tokens == ask(truth, turn, tokens=12)[0].tokens
