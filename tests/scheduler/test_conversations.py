# SPDX-License-Identifier: Apache-2.0
"""A conversation keeps its own cache: its next turns find its private pages again."""

from __future__ import annotations

from collections.abc import Callable

from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
PROMPT = [*words("agent", 10), *QUESTION, *words("tail", 6)]
ANSWER = words("answer", 13)


def warm(engine: EngineWithoutWorker) -> None:
    engine.serve("source", [*words("one", 20), *QUESTION])
    turn = engine.serve("turn1", PROMPT, ANSWER)
    assert turn.report["reused"] > 0


def test_a_follow_up_turn_finds_its_private_pages_without_a_load(make_engine: Make) -> None:
    engine = make_engine()
    warm(engine)
    follow_up = engine.serve("turn2", [*PROMPT, *ANSWER, *words("next", 9)], words("again", 10))
    # 56 of the prompt and 12 of the answer have KV: 17 full pages
    assert follow_up.spans("local") == [(0, 68)]
    assert follow_up.loaded == []
    third = [*PROMPT, *ANSWER, *words("next", 9), *words("again", 10), *words("more", 5)]
    assert engine.serve("turn3", third).spans("local") == [(0, 84)]
    check_idle(engine)


def test_a_follow_up_turn_runs_in_the_first_step_after_its_arrival(make_engine: Make) -> None:
    """Its chain is adopted as it arrives, so that vLLM's first lookup finds it."""
    engine = make_engine()
    warm(engine)
    engine.add("turn2", [*PROMPT, *ANSWER, *words("next", 9)])
    assert engine.step().num_scheduled_tokens == {"turn2": 78 - 68}


def test_a_retry_finds_all_full_pages_but_the_last_token(make_engine: Make) -> None:
    engine = make_engine()
    warm(engine)
    retry = engine.serve("retry", PROMPT, ANSWER)
    assert retry.spans("local") == [(0, 52)]
    assert retry.loaded == []


def test_two_branches_of_a_conversation_share_its_private_pages(make_engine: Make) -> None:
    engine = make_engine()
    warm(engine)
    for branch in range(2):
        prompt = [*PROMPT, *ANSWER, *words(("branch", branch), 9)]
        assert engine.serve(f"branch{branch}", prompt).spans("local") == [(0, 68)]


def test_an_adopted_chain_is_not_continued_exactly(make_engine: Make) -> None:
    """What a follow-up turn computes stands on approximate pages: private as well."""
    engine = make_engine()
    warm(engine)
    follow_up = [*PROMPT, *ANSWER, *words("next", 30)]
    engine.serve("turn2", follow_up)
    exact = engine.serve("exact", follow_up, hints={"mode": "off"})
    assert exact.spans("local") == [(0, 12)]


def test_a_conversation_whose_pages_are_gone_starts_over(make_engine: Make) -> None:
    engine = make_engine(num_blocks=40)
    warm(engine)
    for number in range(4):
        engine.serve(f"other{number}", words(("other", number), 120))
    follow_up = engine.serve("turn2", [*PROMPT, *ANSWER, *words("next", 9)])
    assert follow_up.report["local"] == 0
    check_idle(engine)


def test_a_chain_cut_in_the_middle_serves_its_head_and_loads_the_rest(make_engine: Make) -> None:
    """Same context: behind the missing page nothing is rotated, and there is no seam; the page
    itself holds text that is exact elsewhere.
    """
    engine = make_engine()
    warm(engine)
    index = engine.half.store.index
    (sequence,) = (found for found in index._row_of if found.owner == "turn1")
    page = engine.half.pages.lookup(sequence.block_hashes[6])
    assert page is not None
    engine.pool.evict_blocks({page.block_id})
    follow_up = engine.serve("turn2", [*PROMPT, *ANSWER, *words("next", 9)])
    assert follow_up.spans("local") == [(0, 24)]
    assert follow_up.spans("reused") == [(24, 28), (28, 68)]
    assert follow_up.report["seam"] == 0


def test_private_pages_are_not_adopted_where_hints_restrict_reuse(make_engine: Make) -> None:
    engine = make_engine()
    warm(engine)
    exact = engine.serve("exact", [*PROMPT, *ANSWER, 1], hints={"spans": []})
    assert exact.loaded == []
    assert exact.report["local"] <= 12, "what precedes the first approximate token at most"
