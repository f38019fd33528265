# SPDX-License-Identifier: Apache-2.0
"""A real engine finds a placeholder that reuses badly and turns it off, by itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from engines import Answer, ask, connector, make_engine, settle, text
from vllm import LLM

from kvcomm_vllm.scheduler.fidelity import Level

pytestmark = pytest.mark.engine

AGENT, OTHER, TAIL = text(701, 70), text(702, 40), text(703, 6)
OFF = {"mode": "off"}


@pytest.fixture(scope="module")
def strict(tiny_llama: str) -> Iterator[LLM]:
    """KV is moved as it is, which no tiny random model forgives: far above this budget."""
    plugin = {"mode": "rotate", "fidelity_budget": 1e-9, "audit_idle_seconds": 0, "audit_share": 1}
    llm = make_engine(tiny_llama, plugin=plugin)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def hear(llm: LLM, number: int) -> tuple[list[int], Answer]:
    question = text(1000 + number, 120)
    ask(llm, OTHER + question + TAIL, tokens=1, hints=OFF)
    prompt = AGENT + question + TAIL
    (answer,) = ask(llm, prompt, tokens=8)
    settle(llm)
    return prompt, answer


def test_a_placeholder_that_reuses_badly_is_served_exactly(strict: LLM, plain: LLM) -> None:
    served = [hear(strict, number)[1] for number in range(4)]
    assert all(answer.report["reused"] > 60 for answer in served)
    assert [answer.report["seam"] for answer in served] == [0, 0, 16, 16]
    (key,) = served[0].report["placeholders"]
    assert connector(strict)._scheduler.audits.ledger.level(key) is Level.COMPUTED
    prompt, answer = hear(strict, 4)
    assert (answer.report["reused"], answer.report["declined"]) == (0, {"fidelity": 1})
    assert answer.tokens == ask(plain, prompt)[0].tokens


def test_it_is_tried_again_and_stays_off_while_that_is_no_better(strict: LLM) -> None:
    reused = [hear(strict, 100 + number)[1].report["reused"] for number in range(16)]
    assert sum(tokens > 0 for tokens in reused) == 1
    assert hear(strict, 200)[1].report["declined"] == {"fidelity": 1}
