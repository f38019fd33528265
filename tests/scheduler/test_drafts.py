# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: a step computes guesses beside the tokens that stand, and keeps those that
are right.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle, check_report
from engine_without_worker import EngineWithoutWorker
from scripts import words

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
SOURCE = [*words("one", 20), *QUESTION]
READER = [*words("two", 9), *QUESTION, *words("tail", 7)]
ANSWER = words("answer", 50)
WAYS = pytest.mark.parametrize("pipeline", [1, 2])


def stored(engine: EngineWithoutWorker, owner: str) -> list[int]:
    """The tokens whose KV is kept of a request."""
    (sequence,) = (found for found in engine.half.store.index._row_of if found.owner == owner)
    return list(map(int, sequence.tokens))


def guessing(make_engine: Make, share: float = 0.6, **options: object) -> EngineWithoutWorker:
    """Guesses four tokens a step, of which ``share`` are right; pages have four."""
    engine = make_engine(drafts=4, **options)
    engine.drafter.share = share
    return engine


@WAYS
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_all_of_an_answer_is_kept_but_the_last_token_whatever_was_guessed(
    make_engine: Make, pipeline: int, share: float
) -> None:
    engine = guessing(make_engine, share, pipeline=pipeline)
    speaker = [*words("one", 20), *QUESTION]
    engine.serve("speaker", speaker, ANSWER)
    assert stored(engine, "speaker") == [*speaker, *ANSWER[:-1]]
    assert (engine.drafter.right > 0) == (share > 0)
    assert engine.drafter.wrong > 0 or (share, pipeline) == (1, 1)  # ahead, some places stay empty
    listener = engine.serve("listener", [*words("two", 9), *ANSWER, 3])
    assert listener.spans("reused") == [(9 + 2, 9 + 49)]
    check_idle(engine)


def test_guesses_take_fewer_steps(make_engine: Make) -> None:
    """Guards the other tests: all of a right guess is taken."""
    steps = []
    for share in (0.0, 1.0):
        engine = guessing(make_engine, share)
        engine.serve("speaker", QUESTION, ANSWER)
        steps.append(sum("speaker" in step for step in engine.trace))
    assert steps[0] == 50
    assert steps[1] < 30


@WAYS
def test_of_an_answer_that_is_broken_off_is_kept_what_was_told(
    make_engine: Make, pipeline: int
) -> None:
    """Guesses that nobody has judged yet are not."""
    engine = guessing(make_engine, pipeline=pipeline)
    engine.add("speaker", SOURCE, ANSWER)
    for _ in range(9):
        engine.step()
    engine.schedule()
    engine.abort("speaker")
    told = [t for output in engine.served["speaker"].outputs for t in output.new_token_ids]
    assert 8 < len(told) < 50
    known, kept = [*SOURCE, *told[:-1]], stored(engine, "speaker")
    assert kept == known[: len(kept)]
    assert len(kept) >= len(known) // 4 * 4, "vLLM has named the page of the last token already"
    engine.drain()
    engine.serve("listener", [*words("two", 9), *ANSWER, 3])
    check_idle(engine)


@WAYS
def test_an_answer_that_ends_within_a_guess_is_kept_to_its_end(
    make_engine: Make, pipeline: int
) -> None:
    """What was guessed beyond, rightly, is nobody's text."""
    for length in range(1, 9):
        engine = guessing(make_engine, share=1.0, pipeline=pipeline)
        engine.serve("speaker", SOURCE, ANSWER[:length])
        assert stored(engine, "speaker") == [*SOURCE, *ANSWER[: length - 1]]
        check_idle(engine)


@WAYS
def test_the_one_token_that_a_plan_leaves_is_computed_with_room_for_guesses(
    make_engine: Make, pipeline: int
) -> None:
    engine = guessing(make_engine, pipeline=pipeline)
    engine.serve("source", SOURCE)
    second = engine.serve("second", READER[:49], ANSWER)
    count, table = next(step["second"] for step in engine.trace if "second" in step)
    assert (count, len(table)) == (5, 14)
    assert second.loaded[0].block_ids == table[:12]
    assert second.spans("reused") == [(11, 48)]
    assert stored(engine, "second") == [*READER[:49], *ANSWER[:-1]]
    check_report(engine, "second")
    check_idle(engine)


@WAYS
def test_what_guesses_beside_a_load_is_exact_for_nobody(make_engine: Make, pipeline: int) -> None:
    engine = guessing(make_engine, pipeline=pipeline, reuse_approximate=False, heal="off")
    engine.serve("source", SOURCE)
    engine.serve("second", READER, ANSWER)
    (sequence,) = (one for one in engine.half.store.index._row_of if one.owner == "second")
    assert sequence.first_approximate == 11
    assert len(sequence.tokens) == len(READER) + 49
    exact = engine.serve("exact", [*READER, *ANSWER], hints={"mode": "off"})
    assert exact.report["local"] == 8
    again = engine.serve("turn", [*READER, *ANSWER, *words("turn", 9)])
    assert again.report["local_approximate"] == 0


@WAYS
def test_a_turn_finds_the_pages_of_its_conversation(make_engine: Make, pipeline: int) -> None:
    engine = guessing(make_engine, pipeline=pipeline, heal="off")
    engine.serve("source", SOURCE)
    engine.serve("second", READER, ANSWER)
    turn = engine.serve("turn", [*READER, *ANSWER, *words("turn", 9)])
    assert turn.report["local"] == (len(READER) + 49) // 4 * 4
    assert turn.report["local_approximate"] == turn.report["local"] - 11


def test_an_audit_finds_the_prompt_of_a_request_that_guessed(make_engine: Make) -> None:
    engine = guessing(make_engine, num_blocks=128)
    engine.serve("source", SOURCE)
    engine.serve("second", READER, ANSWER)
    engine.idle()
    compared = [op.comparison.position for op in engine.lessons if op.comparison is not None]
    assert compared == [len(READER) - 1]
    exact = engine.serve("exact", [*READER, *ANSWER], hints={"mode": "off"})
    assert exact.report["local"] == (len(READER) + 49) // 4 * 4, "all of it was healed"


@pytest.mark.parametrize("max_hole_tokens", [0, 4], ids=["one step", "many pieces"])
def test_a_plan_leaves_pages_for_guesses_or_is_not_made(
    make_engine: Make, max_hole_tokens: int
) -> None:
    """What reuses would otherwise be refused its pages by vLLM, each step anew and for ever."""
    for blocks in range(22, 30):
        engine = guessing(make_engine, num_blocks=blocks, max_hole_tokens=max_hole_tokens)
        engine.serve("source", [*words("one", 16), *QUESTION])  # 10 pages of the question
        second = engine.serve("second", [*words("two", 9), *QUESTION, *words("tail", 3)])
        fits = blocks - 1 >= 10 + 13 + 2  # vLLM leaves whole pages for a token and its guesses
        assert bool(second.report["reused"]) == fits
        assert second.declined == ([] if fits else ["no_room"])
        check_idle(engine)


@WAYS
def test_a_preempted_request_keeps_no_guess(make_engine: Make, pipeline: int) -> None:
    engine = guessing(make_engine, num_blocks=40, pipeline=pipeline)
    engine.add("first", words("first", 40), words("yet another", 50))
    engine.add("second", words("second", 40), words("other", 50))
    engine.add("third", words("third", 40), ANSWER)
    preempted = 0
    while engine.scheduler.requests:
        engine.step()
        preempted = max(
            [preempted, *(r.num_preemptions for r in engine.scheduler.requests.values())]
        )
    engine.drain()
    assert preempted
    assert stored(engine, "third") == [*words("third", 40), *ANSWER[:-1]]
    check_idle(engine)


@WAYS
def test_agents_side_by_side_share_what_one_has_just_prefilled(
    make_engine: Make, pipeline: int
) -> None:
    """While it answers, with guesses, from pages that others read."""
    engine = guessing(make_engine, pipeline=pipeline)
    engine.add("first", SOURCE, ANSWER)
    for _ in range(3):
        engine.step()
    second = engine.serve("second", READER)
    assert "first" in engine.scheduler.requests
    assert second.report["reused"] == 38
    engine.run()
    check_idle(engine)


def test_a_failed_load_is_computed_again_whatever_was_guessed_on_top(make_engine: Make) -> None:
    """vLLM takes guesses that follow a token which it takes back."""
    engine = guessing(make_engine, share=1.0)
    engine.serve("source", SOURCE)
    engine.fail = lambda ops: True
    second = engine.serve("second", READER, ANSWER)
    assert second.declined == ["load_failed"]
    assert [t for output in second.outputs for t in output.new_token_ids] == ANSWER
    check_idle(engine)
