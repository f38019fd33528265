# SPDX-License-Identifier: Apache-2.0
"""Approximate KV never reaches a request that did not ask for it, and a conversation keeps its own
cache.
"""

import pytest
from engines import Answer, ask, text
from vllm import LLM

pytestmark = pytest.mark.engine

SHARED = text(101, 200)


def reuse(llm: LLM, seed: int, **options: object) -> tuple[list[int], Answer]:
    """Two agents read SHARED; returns the second one's prompt and answer, which reuses."""
    ask(llm, text(seed, 70) + SHARED + text(seed + 1, 5))
    prompt = text(seed + 2, 70) + SHARED + text(seed + 3, 5)
    answer = ask(llm, prompt, **options)[0]  # type: ignore[arg-type]
    assert answer.report["reused"] > 100
    return prompt, answer


def test_an_exact_request_gets_only_exact_pages_after_reuse(reusing: LLM, plain: LLM) -> None:
    prompt, _ = reuse(reusing, 110)
    exact = ask(reusing, prompt, hints={"mode": "off"})[0]
    assert exact.report["local"] <= 70, "pages behind the agent's own text are approximate"
    assert exact.tokens == ask(plain, prompt)[0].tokens


def test_sharing_only_the_exact_prefix_is_exact(reusing: LLM, plain: LLM) -> None:
    prompt, _ = reuse(reusing, 120)
    other = prompt[:64] + text(125, 90)
    answer = ask(reusing, other)[0]
    assert (answer.report["local"], answer.report["reused"]) == (64, 0)
    assert answer.tokens == ask(plain, other)[0].tokens


def test_a_page_that_begins_with_what_a_hit_has_left_of_it_is_exact(
    reusing: LLM, plain: LLM
) -> None:
    lead = text(126, 80)
    ask(reusing, lead + text(127, 10) + SHARED + text(128, 5))
    edited = lead + text(129, 40) + SHARED + text(128, 5)
    (answer,) = ask(reusing, edited)
    assert answer.report["spans"][:2] == [[0, 64, "local"], [64, 80, "reused"]]
    other = edited[:110] + text(125, 20)
    (exact,) = ask(reusing, other, hints={"mode": "off"})
    assert exact.report["local"] == 96, "nothing before it was moved"
    assert exact.tokens == ask(plain, other)[0].tokens


def test_a_follow_up_turn_finds_its_own_conversation(reusing: LLM, plain: LLM) -> None:
    prompt, answer = reuse(reusing, 130, tokens=40)
    turn = prompt + answer.tokens + text(135, 12)
    follow_up = ask(reusing, turn)[0]
    full, rest = divmod(len(prompt) + len(answer.tokens) - 1, 32)
    assert rest > 16, "the last page is worth a plan"
    assert (follow_up.report["local"], follow_up.report["reused"]) == (32 * full, rest)
    exact = ask(reusing, turn, hints={"mode": "off"})[0]
    assert exact.tokens == ask(plain, turn)[0].tokens


def test_a_retry_is_served_from_its_own_pages_and_answers_the_same(reusing: LLM) -> None:
    prompt, answer = reuse(reusing, 140)
    again = ask(reusing, prompt)[0]
    assert again.report["local"] == (len(prompt) - 1) // 32 * 32
    assert again.tokens == answer.tokens


def test_samples_of_one_prompt_share_its_pages(reusing: LLM) -> None:
    ask(reusing, text(150, 70) + SHARED + text(151, 5))
    prompt = text(152, 70) + SHARED + text(153, 5)
    first, second, third = ask(reusing, prompt, prompt, prompt)
    assert first.report["reused"] > 100
    for answer in (second, third):
        assert (answer.report["local"], answer.report["reused"]) == (len(prompt) // 32 * 32, 0)
    assert second.tokens == third.tokens


def test_tenants_with_different_salts_share_nothing(reusing: LLM) -> None:
    ask(reusing, text(160, 70) + SHARED + text(161, 5))
    prompt = {
        "prompt_token_ids": text(162, 70) + SHARED + text(163, 5),
        "cache_salt": "other tenant",
    }
    from vllm import SamplingParams

    output = reusing.generate([prompt], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    report = output[0].kv_transfer_params["kvcomm"]
    assert (report["local"], report["reused"], report["declined"]) == (0, 0, {"no_match": 1})
