# SPDX-License-Identifier: Apache-2.0
"""A real engine in mode paper: dense until anchors cover a message, estimated from then on."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from engines import Answer, ask, connector, make_engine, settle, text
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

pytestmark = pytest.mark.engine

AGENT, OTHER, TAIL = text(11, 70), text(12, 40), text(13, 9)
PAPER = {"mode": "paper"}


@pytest.fixture(scope="module")
def paper(tiny_llama: str) -> Iterator[LLM]:
    """vLLM with the plugin in mode paper, whose gate lets all pass that anchors cover."""
    plugin = {
        "mode": "paper",
        "paper": {"memory_mb": 8, "gamma": 1.0},
        "audit_idle_seconds": 0,
        "audit_share": 1,
    }
    llm = make_engine(tiny_llama, plugin=plugin)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def hear(llm: LLM, number: int, length: int = 120) -> Answer:
    question = text(1000 + number, length)
    ask(llm, OTHER + question + TAIL, tokens=1)
    (answer,) = ask(llm, AGENT + question + TAIL, tokens=8, hints=PAPER)
    settle(llm)
    return answer


@pytest.mark.support("reuse", "mode paper")
def test_requests_are_dense_until_two_anchors_cover_them_and_then_estimated(paper: LLM) -> None:
    for number in range(2):
        assert hear(paper, number).report["declined"] == {"learning": 1}
    answer = hear(paper, 2)
    report = answer.report
    # all of the question, and its tail but for the last token, which yields the next one
    assert report["corrected"] == 120 + len(TAIL) - 1
    # and exact, what the hit leaves of the agent's own page
    assert report["reused"] == report["corrected"] + len(AGENT) % 32
    assert hear(paper, 3, length=150).report["declined"] == {"learning": 1}


@pytest.mark.support("exactness", "mode paper")
def test_dense_answers_are_those_of_plain_vllm(paper: LLM, plain: LLM) -> None:
    prompts = [AGENT + text(2000 + n, 90) + TAIL for n in range(3)]
    truth = ask(plain, *prompts, tokens=8)
    for number in range(3):
        hear(paper, 40 + number)
    answers = ask(paper, *prompts, tokens=8, hints={"mode": "off"})
    assert [a.tokens for a in answers] == [t.tokens for t in truth]


def test_a_probe_that_fails_leaves_the_request_dense(
    paper: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = get_kv_transfer_group()._worker.equipment.corrections["paper"]

    def broken(*args: object) -> list[float]:
        raise RuntimeError("no more memory")

    with monkeypatch.context() as patch:
        patch.setattr(arena, "distances", broken)
        assert hear(paper, 60).report["declined"] == {"learning": 1}
    assert hear(paper, 61).report["corrected"] > 0


def test_an_estimate_that_fails_is_computed_in_the_same_step(
    paper: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = get_kv_transfer_group()._worker.equipment.corrections["paper"]

    def broken(*args: object) -> None:
        raise RuntimeError("no more memory")

    question = text(3000, 100)
    ask(paper, OTHER + question + TAIL, tokens=1)
    with monkeypatch.context() as patch:
        patch.setattr(arena, "estimate", broken)
        (answer,) = ask(paper, AGENT + question + TAIL, tokens=8, hints=PAPER)
    assert "load_repaired" in answer.report["declined"]
    (truth,) = ask(plain, AGENT + question + TAIL, tokens=8)
    assert answer.tokens == truth.tokens
    assert connector(paper)._scheduler.pages.held == 0
