# SPDX-License-Identifier: Apache-2.0
"""Beside vLLM's hybrid KV cache manager windowed layers have the KV that they look at, and the
pages that plain vLLM gives them.

Every page is checked in every step: what is read is there, and under an exact hash is exact KV.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle, check_report
from scripts import words
from windowed_engine import WindowedEngine

from kvcomm_vllm.compat.pages import evict_soon

Make = Callable[..., WindowedEngine]

QUESTION = words("question", 40)
MESSAGE = words("message", 32)
WINDOW = 9


def cached(engine: WindowedEngine, name: str, group: int) -> list[bool]:
    """Of which pages of a sequence that ended there is one in a group."""
    index = engine.half.store.index
    hashes = next(s.block_hashes for s in index._row_of if s.owner == name)
    return [engine.half.pages.lookup(one, group) is not None for one in hashes]


def evict(engine: WindowedEngine, name: str, group: int, *pages: int) -> None:
    """These pages of a sequence are given to others, in one group alone."""
    index = engine.half.store.index
    sequence = next(s for s in index._row_of if s.owner == name)
    for number in pages:
        block = engine.half.pages.lookup(sequence.block_hashes[number], group)
        assert block is not None
        engine.half.pages.evict([block.block_id])
        evict_soon(engine.pool, [block])


def test_shared_text_is_reused_as_without_windows(make_windowed: Make) -> None:
    engine = make_windowed({"seam_tokens": 3})
    engine.serve("first", [*words("one", 20), *QUESTION, *words("end", 4)])
    second = engine.serve("second", [*words("two", 29), *QUESTION, *words("tail", 7)])
    assert second.spans("reused") == [(29 + 3, 29 + 40)]
    assert second.report["seam"] == 3
    check_report(engine, "second")
    check_idle(engine)


def test_a_hole_in_the_middle_finds_its_window_in_pages_that_stand_in(make_windowed: Make) -> None:
    engine = make_windowed()
    engine.serve("first", [*words("one", 20), *QUESTION])
    engine.serve("second", [*words("two", 8), *MESSAGE, *words("end", 4)])
    third = engine.serve("third", [*words("3", 12), *MESSAGE, *words("gap", 6), *QUESTION, 3, 4])
    assert third.spans("reused") == [(14, 12 + 32), (12 + 32 + 6 + 2, 12 + 32 + 6 + 40)]
    (ops,) = third.loaded
    windowed = ops.windowed[1]
    first_hole, second_hole = range(14 // 4 + 1), range((44 - WINDOW + 1) // 4, (51 // 4) + 1)
    own = (90 - WINDOW + 1) // 4
    there = {number for number, page in enumerate(windowed.pages) if page}
    assert windowed.own == own
    assert there == {*first_hole, *second_hole, *range(own, 23)}
    check_idle(engine)


def test_a_request_keeps_as_many_pages_as_with_plain_vllm(make_windowed: Make) -> None:
    """While it decodes: of the windowed group those of a window alone."""
    engine = make_windowed()
    engine.serve("first", [*words("one", 20), *QUESTION])
    engine.add("second", [*words("two", 29), *QUESTION, 3], words("answer", 12))
    for _ in range(4):
        engine.step()
    full, windowed = engine.scheduler.kv_cache_manager.get_block_ids("second")
    assert len(full) == len(windowed) == 19
    assert sum(page != 0 for page in windowed) <= -(-WINDOW // 4) + 1
    assert engine.half.pages.held == 0
    engine.run()


def test_text_behind_a_window_that_is_gone_is_computed(make_windowed: Make) -> None:
    """A hole there, or vLLM's own forward, would look at what is not there."""
    engine = make_windowed()
    engine.serve("first", [*words("one", 20), *QUESTION, *words("end", 4)])
    engine.serve("other", [*words("other", 9), *MESSAGE])
    evict(engine, "first", 1, 13, 14)  # tokens 52 .. 60
    prompt = [*words("two", 20), *QUESTION, *words("gap", 9), *MESSAGE, 3, 4]
    middle = engine.serve("middle", prompt)
    assert middle.spans("reused") == [(22, 52), (20 + 40 + 9 + 2, 20 + 40 + 9 + 32)]
    check_report(engine, "middle")
    end = engine.serve("end", [*words("3", 20), *QUESTION, *words("tail", 9)])
    assert end.spans("reused") == [(22, 52)]
    check_idle(engine)


def test_a_page_that_vllm_goes_on_to_fill_is_whole(make_windowed: Make) -> None:
    """A window smaller than a page ends a plan in the page that vLLM names when it is full."""
    engine = make_windowed(windows=(5,), block_size=16)
    engine.serve("first", [*words("one", 20), *QUESTION])
    evict(engine, "first", 1, 2)  # tokens 32 .. 48, of which 45 .. 48 would come to lie in it
    second = engine.serve("second", [*words("two", 23), *QUESTION, 3, 4], words("answer", 20))
    assert second.spans("reused") == [(25, 35)]
    check_idle(engine)


def test_nothing_is_reused_where_no_window_is_left(make_windowed: Make) -> None:
    engine = make_windowed()
    engine.serve("first", [*words("one", 20), *QUESTION])
    pages = [number for number, there in enumerate(cached(engine, "first", 1)) if there]
    evict(engine, "first", 1, *pages)
    second = engine.serve("second", [*words("two", 29), *QUESTION, 3])
    assert second.report["reused"] == 0
    assert second.declined == ["source_evicted"]
    check_idle(engine)


def test_a_copy_is_a_source_where_it_was_looked_at(make_windowed: Make) -> None:
    """Pages that stood in are kept like others: the third agent goes on from the second's copy."""
    engine = make_windowed()
    engine.serve("first", [*words("one", 20), *MESSAGE])
    prompt = [*words("two", 12), *MESSAGE, *words("gap", 12), *QUESTION, 3]
    engine.serve("zero", [*words("zero", 16), *QUESTION])
    engine.serve("second", prompt)
    there = cached(engine, "second", 1)
    assert there[: (12 + 32) // 4].count(True) >= 3, "the window in front of the gap is kept"
    for name in ("first", "zero"):
        index = engine.half.store.index
        sequence = next(s for s in index._row_of if s.owner == name)
        for group in (0, 1):
            for block_hash in sequence.block_hashes:
                block = engine.half.pages.lookup(block_hash, group)
                if block is not None:
                    engine.half.pages.evict([block.block_id])
    third = engine.serve("third", [*words("3", 8), *prompt[12:-1], 5, 6, 7])
    assert third.report["reused"] > 0
    check_idle(engine)


def test_a_follow_up_turn_finds_its_own_conversation(make_windowed: Make) -> None:
    engine = make_windowed()
    engine.serve("first", [*words("one", 20), *QUESTION, *words("end", 4)])
    prompt = [*words("two", 29), *QUESTION, *words("tail", 6)]
    answer = words("answer", 14)
    second = engine.serve("second", prompt, answer)
    assert second.report["reused"] == 38
    third = engine.serve("third", [*prompt, *answer, *words("turn", 9)])
    assert third.report["local"] == (len(prompt) + len(answer) - 1) // 4 * 4
    check_idle(engine)


def test_an_exact_request_never_gets_a_private_page_of_any_group(make_windowed: Make) -> None:
    engine = make_windowed()
    engine.serve("first", [*words("one", 20), *QUESTION, *words("end", 4)])
    prompt = [*words("two", 29), *QUESTION, *words("tail", 6)]
    assert engine.serve("second", prompt).report["reused"] == 38
    exact = engine.serve("exact", prompt, hints={"mode": "off"})
    assert exact.report["local"] <= 28
    check_idle(engine)


@pytest.mark.parametrize("windows", [(2,), (4,), (5, 5, 5), (9, 17), (64,)])
@pytest.mark.parametrize("local", [0, 16])
def test_a_load_that_fails_is_computed_page_by_page(
    make_windowed: Make, windows: tuple[int, ...], local: int
) -> None:
    """Though there are pages for one window alone; what is there at the end is what is there when
    nothing fails.
    """
    engine = make_windowed(windows=windows, num_blocks=200)
    engine.serve("first", [*words("one", 20), *QUESTION, *words("end", 4)])
    engine.serve("warm", [*words("two", local), *words("other", 8)])
    engine.break_load = lambda ops: True
    prompt = [*words("two", local), *words("mine", 31), *QUESTION, *words("tail", 6)]
    second = engine.serve("second", prompt, words("answer", 20))
    assert engine.repaired == 1
    assert second.declined == ["load_repaired"]
    check_idle(engine)


def test_a_plan_with_more_holes_than_a_step_takes_is_declined_by_name(make_windowed: Make) -> None:
    engine = make_windowed({"max_hole_tokens": 20})
    engine.serve("first", [*words("one", 20), *QUESTION])
    second = engine.serve("second", [*words("two", 29), *QUESTION, 3])
    assert second.declined == ["window_holes"]


def test_the_same_context_is_reused_exactly_where_vllm_itself_finds_nothing(
    make_windowed: Make,
) -> None:
    """A page is gone that vLLM's own lookup would need, and windows further on are there."""
    engine = make_windowed()
    prompt = [*words("one", 40), *QUESTION]
    engine.serve("first", prompt)
    evict(engine, "first", 1, 18, 19)
    again = engine.serve("again", prompt)
    assert again.report["local"] + again.report["reused"] > 60
    assert again.report["local_approximate"] == 0
    check_idle(engine)
