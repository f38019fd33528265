# SPDX-License-Identifier: Apache-2.0
"""What is computed in holes is what plain vLLM computes; what is moved is what it would have
computed there.
"""

from collections.abc import Iterable

import pytest
from engines import Answer, ask, core, make_engine, text
from stored_kv import first_layer
from vllm import LLM

from kvcomm_vllm.scheduler.modes import plain as plain_mode
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan

pytestmark = pytest.mark.engine

SHARED = text(1, 200)
TAIL = text(9, 6)


def holes_only(local: int, spans: Iterable[ReuseSpan], *rest: object) -> Plan:
    """A plan that ends like a real one but reuses nothing: three holes, up to the end of the last
    span.
    """
    last = list(spans)[-1]
    cuts = [local + 7, local + 40, last.end]
    return Plan(local, tuple(ReuseSpan(cut, cut, 0, last.source) for cut in cuts))


PROMPTS = [text(seed, 60 + seed) + SHARED + TAIL for seed in (3, 4, 5)]


@pytest.mark.support("reuse", "default settings")
def test_an_engine_that_is_a_producer_to_vllm_reuses(reusing: LLM) -> None:
    """It was asked for in the role kv_both."""
    assert core(reusing).scheduler.vllm_config.kv_transfer_config.kv_role == "kv_producer"
    ask(reusing, text(22, 70) + SHARED + TAIL)
    (answer,) = ask(reusing, text(23, 61) + SHARED + TAIL)
    assert answer.report["reused"] > 150


def check_holes(llm: LLM, truth: list[Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    ask(llm, text(2, 70) + SHARED + TAIL)
    monkeypatch.setattr(plain_mode, "make_plan", holes_only)
    answers = ask(llm, *PROMPTS, tokens=12)
    for answer, dense in zip(answers, truth, strict=True):
        assert answer.report["computed"] == answer.report["prompt_tokens"] - answer.report["local"]
        assert answer.report["gap"] > 200, "the holes were not computed by the side forward"
        assert answer.tokens == dense.tokens


@pytest.mark.support("exactness", "default settings")
def test_holes_alone_give_exactly_the_dense_answer(
    reusing: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests of three holes each in one side forward."""
    check_holes(reusing, ask(plain, *PROMPTS, tokens=12), monkeypatch)


@pytest.mark.support("exactness", "default settings")
def test_mode_off_gives_the_tokens_of_plain_vllm(reusing: LLM, plain: LLM) -> None:
    """Beside requests that are reused: what a server with the plugin may stand in for plain vLLM
    by, as `kvcomm demo` lets it.
    """
    prompts = [text(seed, 50 + seed) + SHARED + TAIL for seed in (13, 14, 15)]
    ask(reusing, text(12, 70) + SHARED + TAIL)
    assert all(answer.report["reused"] > 150 for answer in ask(reusing, *prompts))
    answers = ask(reusing, *prompts, tokens=12, hints={"mode": "off"})
    truth = ask(plain, *prompts, tokens=12)
    assert [answer.tokens for answer in answers] == [dense.tokens for dense in truth]
    assert {answer.report["reused"] for answer in answers} == {0}


@pytest.mark.support("layer 0", "default settings")
def test_moved_keys_of_the_first_layer_equal_native_ones(tiny_llama: str, reusing: LLM) -> None:
    """Layer 0 sees no context, so re-rotation alone must give what a dense prefill gives there."""
    prompt = text(6, 75) + SHARED + TAIL
    ask(reusing, text(7, 64) + SHARED + TAIL)
    answer = ask(reusing, prompt)[0]
    start, end = next(s[:2] for s in answer.report["spans"] if s[2] == "reused")
    moved = first_layer(reusing, prompt)
    core(reusing).scheduler.reset_prefix_cache(reset_connector=True)
    ask(reusing, prompt, hints={"mode": "off"})
    native = first_layer(reusing, prompt)
    keys, values = (
        pair[0][start:end] - pair[1][start:end] for pair in zip(moved, native, strict=True)
    )
    assert end - start > 100
    assert float(keys.norm() / native[0][start:end].norm()) < 5e-3  # bf16 rounds a key to 4e-3
    assert float(values.abs().max()) == 0.0


def test_a_second_engine_of_a_process_never_uses_the_first_ones_pages(
    tiny_llama: str, reusing: LLM
) -> None:
    """vLLM keeps one connector per process; the second engine serves exactly instead."""
    second = make_engine(tiny_llama, plugin={})
    try:
        ask(second, text(2, 70) + SHARED + TAIL)
        answer = ask(second, text(3, 70) + SHARED + TAIL)[0]
    finally:
        second.llm_engine.engine_core.shutdown()
    assert answer.report["reused"] == 0
