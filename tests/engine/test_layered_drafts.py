# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding by a model of its own, beside reuse: its KV is moved and computed with the
target's, so that its guesses stay as good as they are without.

The drafter is the target itself: what it guesses is right as long as it reads what the target does.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from accidents import abort_after, assert_nothing_is_held, break_part
from engines import ask, core, make_engine, settle, text
from guesses import Guesses, counted
from since import GUESSES
from stored_kv import KV, layers, start_log
from test_exactness import PROMPTS, check_holes
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

pytestmark = [pytest.mark.engine, pytest.mark.slow, GUESSES]

SHARED, TAIL = text(851, 200), text(852, 6)
SOURCE = text(853, 70) + SHARED + TAIL
READER = text(854, 61) + SHARED + TAIL
OFF = {"mode": "off"}
OPTIONS: dict[str, Any] = {"num_gpu_blocks_override": 64, "max_model_len": 704}


@pytest.fixture(scope="module")
def drafting(tiny_llama: str) -> Iterator[LLM]:
    itself = {"method": "draft_model", "model": tiny_llama, "num_speculative_tokens": 3}
    audits = {"audit_idle_seconds": 0, "audit_share": 1}
    with start_log() as log:
        llm = make_engine(tiny_llama, plugin=audits, speculative_config=itself, **OPTIONS)
    (line,) = [line for line in log if "reuse is" in line]
    assert "reuse is ON" in line
    assert "3 layers in 1 group(s)" in line
    assert "that guess" in line
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


@pytest.fixture
def guesses(drafting: LLM) -> Iterator[Guesses]:
    assert core(drafting).scheduler.reset_prefix_cache(reset_connector=True)
    with counted(drafting) as found:
        yield found


def apart(some: list[KV], others: list[KV], tokens: slice) -> float:
    """How far the worst layer's keys or values are from others, relative to them."""
    found = 0.0
    for pair, other in zip(some, others, strict=True):
        for mine, its in zip(pair, other, strict=True):
            difference = (mine[tokens] - its[tokens]).norm() / its[tokens].norm()
            found = max(found, float(difference))
    return found


def test_what_is_not_reused_is_answered_as_by_plain_vllm_and_guessed_well(
    drafting: LLM, plain: LLM, guesses: Guesses
) -> None:
    answers = ask(drafting, *PROMPTS, tokens=40, hints=OFF)
    assert [a.tokens for a in answers] == [a.tokens for a in ask(plain, *PROMPTS, tokens=40)]
    assert guesses.share > 0.9


def test_holes_alone_give_the_dense_answer_and_leave_the_drafter_as_good(
    drafting: LLM, plain: LLM, guesses: Guesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_holes(drafting, ask(plain, *PROMPTS, tokens=12), monkeypatch)
    # the first step of each has three guesses that vLLM has filled in
    assert guesses.wrong <= 3 * len(PROMPTS) + 3


def test_the_drafters_kv_is_moved_with_the_targets(drafting: LLM, guesses: Guesses) -> None:
    """Both are of the same weights, so they are to be the same KV."""
    ask(drafting, SOURCE)
    (answer,) = ask(drafting, READER, tokens=60)
    assert answer.report["reused"] > 150
    assert guesses.wrong <= 3 + 6, "but for those of the step that loads"
    target, drafts = layers(drafting, READER), layers(drafting, READER, of="drafts")
    assert len(target) == len(drafts) == 3
    # what is behind the prompt was decoded one by one, and in threes
    assert apart(drafts, target, slice(0, len(READER) - 1)) < 0.02


def test_the_drafters_kv_is_healed_with_the_targets(
    drafting: LLM, plain: LLM, guesses: Guesses
) -> None:
    ask(drafting, SOURCE)
    ask(drafting, READER, tokens=40)
    settle(drafting)
    guesses.right = guesses.wrong = 0
    (exact,) = ask(drafting, READER, tokens=40, hints=OFF)
    assert exact.report["local"] >= (len(READER) - 1) // 32 * 32
    assert exact.tokens == ask(plain, READER, tokens=40)[0].tokens
    assert guesses.share > 0.9


def test_an_exact_request_gets_only_exact_pages(
    drafting: LLM, plain: LLM, guesses: Guesses
) -> None:
    ask(drafting, SOURCE)
    (answer,) = ask(drafting, READER, tokens=60)
    turn = READER + answer.tokens
    (exact,) = ask(drafting, turn, hints=OFF)
    assert exact.report["local"] <= 70
    assert exact.tokens == ask(plain, turn)[0].tokens


def test_a_request_aborted_in_flight_leaves_the_engine_whole(
    drafting: LLM, plain: LLM, guesses: Guesses
) -> None:
    ask(drafting, SOURCE)
    for steps in (0, 1, 2, 9):
        abort_after(drafting, text(861 + steps, 60) + SHARED + TAIL, steps)
    (exact,) = ask(drafting, READER, hints=OFF)
    assert exact.tokens == ask(plain, READER)[0].tokens
    assert_nothing_is_held(drafting)


@pytest.mark.parametrize("broken", ["kernel", "first side_forward", "every side_forward"])
def test_a_failed_load_is_computed_and_gives_the_dense_answer(
    drafting: LLM, plain: LLM, guesses: Guesses, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(drafting, SOURCE)
    worker: Any = get_kv_transfer_group()
    break_part(worker._worker, broken, monkeypatch)
    (answer,) = ask(drafting, READER, tokens=30)
    assert answer.report["reused"] == 0
    assert answer.tokens == ask(plain, READER, tokens=30)[0].tokens
    monkeypatch.undo()
    assert_nothing_is_held(drafting)
