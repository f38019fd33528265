# SPDX-License-Identifier: Apache-2.0
"""A real engine with vLLM's ``OffloadingConnector`` beside ours, in either order; its pool has a
worker for CPUs, which vLLM's own has not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from engines import (
    IN_ONE_PROCESS,
    POOL,
    Answer,
    ask,
    connector,
    core,
    elsewhere,
    make_engine,
    text,
)
from since import since
from stored_kv import start_log
from vllm import LLM

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    since("0.30", "pools made by the number of chunks"),
]

SHARED = text(801, 200)
PAGES = 66
QUIET: dict[str, Any] = {"audits": False, "heal": "off"}
FLOAT32: dict[str, Any] = {"dtype": "float32"}


@pytest.fixture(scope="module")
def truth(tiny_llama: str) -> Iterator[LLM]:
    """Plain vLLM of the same precision, without prefix caching."""
    with elsewhere():
        llm = make_engine(tiny_llama, enable_prefix_caching=False, **FLOAT32, **IN_ONE_PROCESS)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module", params=[False, True], ids=["ours-first", "ours-last"])
def both(request: pytest.FixtureRequest, tiny_llama: str) -> Iterator[LLM]:
    with start_log() as log:
        llm = make_engine(
            tiny_llama,
            QUIET,
            beside=[POOL],
            last=request.param,
            num_gpu_blocks_override=PAGES,
            **FLOAT32,
        )
    (said,) = [line for line in log if "reuse is" in line]
    assert "reuse is ON" in said
    assert ", beside OffloadingConnector: " in said
    yield llm
    llm.llm_engine.engine_core.shutdown()


def offloading(llm: LLM) -> Any:
    parts = core(llm).scheduler.connector._connectors
    return next(part for part in parts if part is not connector(llm))


def settle(llm: LLM) -> None:
    """Step until all copies are over."""
    end = time.monotonic() + 60
    while core(llm).scheduler.has_requests():
        assert time.monotonic() < end, "copying does not come to an end"
        core(llm).step_fn()


def fill(llm: LLM, seed: int) -> None:
    """Other work takes all pages."""
    settle(llm)
    for number in range(6):
        ask(llm, text(1000 * seed + number, 500), tokens=2)
    settle(llm)


def quoted(llm: LLM, seed: int) -> tuple[list[int], Answer]:
    """An agent's text, and another agent that quotes it."""
    ask(llm, text(seed, 70) + SHARED + text(seed + 1, 5))
    prompt = text(seed + 2, 70) + SHARED + text(seed + 3, 5)
    return prompt, ask(llm, prompt)[0]


def test_what_agents_quote_is_reused_and_reported(both: LLM) -> None:
    _, answer = quoted(both, 810)
    assert answer.report["reused"] > 100


def test_exact_requests_get_plain_answers_from_what_was_offloaded(both: LLM, truth: LLM) -> None:
    prompt, reused = quoted(both, 820)
    assert reused.report["reused"] > 100
    fill(both, 2)
    (exact,) = ask(both, prompt, hints={"mode": "off"}, logprobs=3)
    assert exact.report["local"] == 64, "the pages before the first that was reused"
    (true,) = ask(truth, prompt, logprobs=3)
    assert exact.tokens == true.tokens
    for step, right in zip(exact.logprobs, true.logprobs, strict=True):
        difference = [step[token] - right[token] for token in step.keys() & right.keys()]
        assert np.abs(difference).max() < 1e-3


def test_an_exact_beginning_comes_back_and_is_read_again(both: LLM, truth: LLM) -> None:
    lead = text(830, 70) + SHARED + text(831, 5)
    ask(both, lead, hints={"mode": "off"})
    fill(both, 3)
    longer = lead + text(832, 9)
    (back,) = ask(both, longer)
    assert back.report["local"] == len(lead) // 32 * 32
    assert back.tokens == ask(truth, longer)[0].tokens
    (reader,) = ask(both, text(833, 70) + SHARED + text(834, 5))
    assert reader.report["reused"] > 100


def test_all_pages_are_free_when_nothing_is_to_be_done(both: LLM) -> None:
    quoted(both, 840)
    settle(both)
    pages = connector(both)._scheduler.pages
    assert (pages.held, pages.free) == (0, PAGES - 1)
    assert not offloading(both).has_pending_push_work()
    assert core(both).scheduler.reset_prefix_cache()
