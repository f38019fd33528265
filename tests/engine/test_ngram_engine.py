# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding that looks tokens up in the text, beside reuse: what is guessed wrong leaves
no trace in what is kept.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from accidents import abort_after, assert_nothing_is_held, break_part
from engines import IN_ONE_PROCESS, Answer, ask, core, elsewhere, make_engine, settle, text
from guesses import Guesses, counted
from since import GUESSES, since
from stored_kv import KV, layers, start_log
from test_exactness import PROMPTS, check_holes
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

pytestmark = [pytest.mark.engine, GUESSES]

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
SHARED, TAIL = text(701, 200), text(702, 6)
REPEATED = text(703, 9) * 8
SOURCE = text(704, 70) + SHARED + TAIL
OFF = {"mode": "off"}
AUDITS = {"audit_idle_seconds": 0, "audit_share": 1}
# Pages for four such prompts, 36, but not for 60 tokens more of each.
OPTIONS: dict[str, Any] = {"num_gpu_blocks_override": 41, "max_model_len": 704}


@pytest.fixture(scope="module")
def guessing(tiny_llama: str) -> Iterator[LLM]:
    with start_log() as log:
        llm = make_engine(tiny_llama, plugin=AUDITS, speculative_config=dict(NGRAM), **OPTIONS)
    assert any("reuse is ON" in line for line in log)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


@pytest.fixture
def guesses(guessing: LLM) -> Iterator[Guesses]:
    """Of this test's steps."""
    with counted(guessing) as found:
        yield found


def reset(llm: LLM) -> None:
    assert core(llm).scheduler.reset_prefix_cache(reset_connector=True), "pages are still in use"


@pytest.mark.support("exactness", "drafts by ngram")
def test_what_is_not_reused_is_answered_as_by_plain_vllm(
    guessing: LLM, plain: LLM, guesses: Guesses
) -> None:
    ask(guessing, SOURCE)
    prompts = [text(seed, 40) + REPEATED + TAIL for seed in (711, 712, 713)]
    answers = ask(guessing, *prompts, tokens=80, hints=OFF)
    assert [a.tokens for a in answers] == [a.tokens for a in ask(plain, *prompts, tokens=80)]
    assert guesses.right > 10
    assert guesses.wrong > 10


@pytest.mark.support("exactness", "drafts by ngram")
def test_holes_alone_give_exactly_the_dense_answer_beside_guesses(
    guessing: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of each has guesses in it, as its plan leaves one token to compute."""
    check_holes(guessing, ask(plain, *PROMPTS, tokens=12), monkeypatch)


@pytest.mark.support("reuse", "drafts by ngram")
@since("0.32", "steps filled up with guesses that nobody made")
def test_a_step_that_loads_has_guesses_in_it(guessing: LLM, guesses: Guesses) -> None:
    ask(guessing, SOURCE, tokens=1)
    assert guesses == Guesses(), "a prompt that is computed has none"
    (answer,) = ask(guessing, text(721, 61) + SHARED + TAIL, tokens=1)
    assert answer.report["reused"] > 150
    assert (guesses.right, guesses.wrong) == (0, 3), "vLLM fills up what it has no guesses for"


def distances(found: list[KV], true: list[KV]) -> list[float]:
    """Per layer how far the KV of the worst token is from true: relative to an average token's."""
    worst = []
    for one, other in zip(found, true, strict=True):
        count = min(len(one[0]), len(other[0]))
        for mine, its in zip(one, other, strict=True):
            apart = (mine[:count] - its[:count]).flatten(1).norm(dim=1)
            worst.append(float(apart.max() / its[:count].flatten(1).norm(dim=1).mean()))
    return worst


def test_the_kv_kept_of_an_answer_is_that_of_its_tokens(guessing: LLM, guesses: Guesses) -> None:
    """In every slot that held a wrong guess first, too."""
    reset(guessing)
    prompt = text(741, 40) + REPEATED
    (answer,) = ask(guessing, prompt, tokens=90)
    assert guesses.right > 10
    assert guesses.wrong > 10
    whole = prompt + answer.tokens
    kept = layers(guessing, whole[:-1])
    assert len(kept[0][0]) == len(whole) - 1, "up to the token that was never forwarded"
    reset(guessing)
    ask(guessing, whole, tokens=24, hints=OFF)  # all of it in full pages
    true = layers(guessing, whole)
    assert len(true[0][0]) >= len(whole) - 1
    assert max(distances(kept, true)) < 0.1, "bf16 rounds differently in batches of other sizes"
    shifted = [(key[1:], value[1:]) for key, value in true]
    assert min(distances(kept, shifted)) > 0.5, "another token's would have been seen"


def story(llm: LLM) -> list[Answer]:
    """One agent answers; others quote the answer, and a turn follows."""
    found = ask(llm, text(741, 40) + REPEATED, tokens=90)
    said = found[0].tokens
    for seed in (742, 743):
        found += ask(llm, text(seed, 50 + seed % 7) + said + TAIL, tokens=40)
    found += ask(llm, text(741, 40) + REPEATED + said + text(744, 9), tokens=30)
    return found


def test_answers_are_reused_as_from_an_engine_that_guesses_nothing(
    tiny_llama: str, guessing: LLM, guesses: Guesses
) -> None:
    reset(guessing)
    told = story(guessing)
    assert guesses.right > 10
    with elsewhere():
        quiet = {"heal": "off", "audits": False}
        other = make_engine(tiny_llama, plugin=quiet, **IN_ONE_PROCESS, **OPTIONS)
    try:
        expected = story(other)
    finally:
        other.llm_engine.engine_core.shutdown()
    assert [answer.report["reused"] > 60 for answer in told] == [False, True, True, False]
    assert told[3].report["local"] == 192
    for answer in told + expected:
        del answer.report["placeholders"]  # named with a secret
    assert [answer.report for answer in told] == [answer.report for answer in expected]
    assert [answer.tokens for answer in told] == [answer.tokens for answer in expected]


def test_an_exact_request_gets_only_exact_pages(guessing: LLM, plain: LLM) -> None:
    reset(guessing)
    ask(guessing, SOURCE)
    prompt = text(751, 70) + SHARED + TAIL
    (answer,) = ask(guessing, prompt, tokens=60)
    assert answer.report["reused"] > 150
    turn = prompt + answer.tokens
    (exact,) = ask(guessing, turn, hints=OFF)
    assert exact.report["local"] <= 70
    assert exact.tokens == ask(plain, turn)[0].tokens


def test_an_audit_heals_what_was_answered_with_guesses(
    guessing: LLM, plain: LLM, heard: list[Any]
) -> None:
    reset(guessing)
    ask(guessing, SOURCE)
    prompt = text(761, 70) + SHARED + TAIL
    (answer,) = ask(guessing, prompt, tokens=60)
    settle(guessing)
    assert len(heard) == 1
    turn = prompt + answer.tokens
    (exact,) = ask(guessing, turn, tokens=30, hints=OFF)
    assert exact.report["local"] == (len(turn) - 1) // 32 * 32
    assert exact.tokens == ask(plain, turn, tokens=30)[0].tokens


def test_preempted_requests_finish_and_leave_no_approximate_page(
    guessing: LLM, plain: LLM, guesses: Guesses
) -> None:
    reset(guessing)
    ask(guessing, SOURCE)
    prompts = [text(seed, 60) + SHARED + TAIL for seed in (771, 772, 773, 774)]
    preempt, preempted = core(guessing).scheduler._preempt_request, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            core(guessing).scheduler,
            "_preempt_request",
            lambda request, *rest, **more: (
                preempted.append(request) or preempt(request, *rest, **more)
            ),
        )
        answers = ask(guessing, *prompts, tokens=80)
    assert preempted
    assert [len(answer.tokens) for answer in answers] == [80] * 4
    assert sum(answer.report["reused"] > 0 for answer in answers) >= 2
    for prompt in prompts:
        (exact,) = ask(guessing, prompt, hints=OFF)
        assert exact.tokens == ask(plain, prompt)[0].tokens
    assert_nothing_is_held(guessing)


def test_a_request_aborted_in_flight_leaves_the_engine_whole(guessing: LLM, plain: LLM) -> None:
    reset(guessing)
    ask(guessing, SOURCE)
    for steps in (0, 1, 2, 9):
        abort_after(guessing, text(781 + steps, 60) + SHARED + TAIL, steps)
    prompt = text(780, 60) + SHARED + TAIL
    assert ask(guessing, prompt)[0].report["reused"] > 0
    (exact,) = ask(guessing, prompt, hints=OFF)
    assert exact.tokens == ask(plain, prompt)[0].tokens
    assert_nothing_is_held(guessing)


@pytest.mark.parametrize("broken", ["kernel", "first side_forward", "every side_forward"])
def test_a_failed_load_is_computed_and_gives_the_dense_answer(
    guessing: LLM, plain: LLM, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within its step, or, where the repair fails as well, by vLLM, which takes back what was
    guessed on top.
    """
    reset(guessing)
    ask(guessing, SOURCE)
    prompt = text(791, 60) + SHARED + TAIL
    worker: Any = get_kv_transfer_group()
    break_part(worker._worker, broken, monkeypatch)
    (answer,) = ask(guessing, prompt, tokens=30)
    reason = "load_failed" if broken.startswith("every") else "load_repaired"
    assert answer.report["declined"] == {reason: 1}
    assert answer.report["reused"] == 0
    assert answer.tokens == ask(plain, prompt, tokens=30)[0].tokens
    monkeypatch.undo()
    assert_nothing_is_held(guessing)
