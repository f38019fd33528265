# SPDX-License-Identifier: Apache-2.0
"""A real engine makes what it has served approximately exact, while it is idle."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from engines import Answer, ask, connector, core, make_engine, settle, text
from vllm import LLM

pytestmark = pytest.mark.engine

SHARED = text(501, 200)
OFF = {"mode": "off"}
PAGE = 32


@pytest.fixture(scope="module")
def healing(tiny_llama: str) -> Iterator[LLM]:
    """vLLM with the plugin, that heals as soon as it is idle; KV is moved as it is."""
    plugin = {"mode": "rotate", "audit_idle_seconds": 0, "audit_share": 1, "audit_tokens": 64}
    llm = make_engine(tiny_llama, plugin=plugin)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def reuse(llm: LLM, seed: int) -> tuple[list[int], Answer]:
    """Two agents read SHARED, the second one approximately: its prompt and its answer."""
    ask(llm, text(seed, 70) + SHARED + text(seed + 1, 5))
    prompt = text(seed + 2, 70) + SHARED + text(seed + 3, 15)
    (answer,) = ask(llm, prompt, tokens=60)
    assert answer.report["reused"] > 100
    return prompt, answer


def free_pages(llm: LLM) -> int:
    return int(core(llm).scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


@pytest.mark.support("exactness", "healing")
def test_a_follow_up_turn_is_an_exact_local_hit(healing: LLM, plain: LLM) -> None:
    prompt, answer = reuse(healing, 510)
    free = free_pages(healing)
    settle(healing)
    assert free_pages(healing) == free
    turn = prompt + answer.tokens + text(515, 12)
    (follow_up,) = ask(healing, turn, tokens=24, logprobs=3)
    stored = len(prompt) + len(answer.tokens) - 1
    assert follow_up.report["local"] >= stored // PAGE * PAGE
    assert follow_up.report["local_approximate"] == 0
    assert follow_up.report["generation"] == 0
    (truth,) = ask(plain, turn, tokens=24, logprobs=3)
    assert follow_up.tokens == truth.tokens
    for mine, dense in zip(follow_up.logprobs, truth.logprobs, strict=True):
        assert mine == pytest.approx({token: dense[token] for token in mine}, abs=0.05)


def test_an_exact_request_finds_the_healed_pages(healing: LLM, plain: LLM) -> None:
    prompt, _ = reuse(healing, 520)
    settle(healing)
    (exact,) = ask(healing, prompt, hints=OFF)
    assert exact.report["local"] == len(prompt) // PAGE * PAGE
    assert exact.tokens == ask(plain, prompt)[0].tokens


def test_who_quotes_a_healed_answer_reads_from_exact_kv(healing: LLM) -> None:
    def quote(seed: int, heal: bool) -> Answer:
        _, answer = reuse(healing, seed)
        if heal:
            settle(healing)
        (quoting,) = ask(healing, text(seed + 5, 40) + answer.tokens + text(seed + 6, 5))
        assert quoting.report["reused"] > 30
        return quoting

    before, after = quote(530, heal=False), quote(540, heal=True)
    assert (before.report["generation"], after.report["generation"]) == (2, 1)
    assert before.report["from_approximate"] > 30
    assert after.report["from_approximate"] == 0


def test_a_request_in_the_middle_of_healing_loses_nothing_and_leaks_nothing(
    healing: LLM, plain: LLM
) -> None:
    settle(healing)
    prompt, answer = reuse(healing, 550)
    free = free_pages(healing)
    lesson = connector(healing)._scheduler.lessons._waiting[-1]
    first = lesson.healing.healed
    while lesson.healing.healed < first + 2 * PAGE:
        core(healing).step()
    assert lesson.healing.wanted
    other = text(555, 300)
    assert ask(healing, other, hints=OFF)[0].tokens == ask(plain, other)[0].tokens
    assert lesson.healing.healed >= first + 2 * PAGE
    settle(healing)
    assert free_pages(healing) == free
    assert not lesson.healing.wanted
    turn = prompt + answer.tokens + text(556, 12)
    (follow_up,) = ask(healing, turn)
    assert follow_up.report["local_approximate"] == 0
    assert follow_up.tokens == ask(plain, turn)[0].tokens


def test_a_reset_in_the_middle_of_healing_succeeds(healing: LLM, plain: LLM) -> None:
    settle(healing)
    prompt, _ = reuse(healing, 560)
    for _ in range(3):
        core(healing).step()
    assert connector(healing)._scheduler.lessons.pending
    assert healing.reset_prefix_cache()
    settle(healing)
    (again,) = ask(healing, prompt, hints=OFF)
    assert again.report["local"] == 0
    assert again.tokens == ask(plain, prompt)[0].tokens
