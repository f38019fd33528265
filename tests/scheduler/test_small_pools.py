# SPDX-License-Identifier: Apache-2.0
"""Pages are held no longer than needed, nobody is starved, what was evicted is a miss."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import Mock

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)


def pages_of(engine: EngineWithoutWorker, owner: str) -> list[int]:
    """Cached pages of a stored sequence, in order."""
    (sequence,) = (found for found in engine.half.store.index._row_of if found.owner == owner)
    pages = [engine.half.pages.lookup(block_hash) for block_hash in sequence.block_hashes]
    return [page.block_id for page in pages if page is not None]


def test_a_request_asked_dozens_of_times_holds_nothing_and_reuses_in_the_end(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(num_blocks=41)
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.add("hog", words("hog", 60), words("long", 40))  # 25 of 40 pages in the end
    engine.step()
    engine.add("asked", [*words("two", 20), *QUESTION, *words("tail", 40)])  # 25 pages
    attempts = Mock(wraps=engine.half.match)
    monkeypatch.setattr(engine.half, "match", attempts)
    while "hog" in engine.scheduler.requests:
        engine.step()
        assert engine.half.pages.held == 0
    engine.run()
    assert attempts.call_count > 24
    assert engine.served["asked"].report["reused"] == 38
    check_idle(engine)


def test_the_same_plan_is_made_on_every_attempt(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION])
    request = engine.add("asked", [*words("two", 9), *QUESTION, 3])
    free = engine.pool.get_num_free_blocks()
    offers, hashes = [], set()
    for _ in range(30):
        offers.append(engine.half.match(request, 0))
        hashes.add(tuple(request.block_hashes))
        held = engine.half.pages.held
        assert held == 10
        assert engine.pool.get_num_free_blocks() == free - held
    assert set(offers) == {(49, False)}
    assert len(hashes) == 1
    engine.run()
    assert engine.served["asked"].report["reused"] == 38
    check_idle(engine)


def test_a_plan_that_vllm_does_not_admit_is_let_go_in_the_same_step(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.add("asked", [*words("two", 9), *QUESTION, 3])
    manager = engine.scheduler.kv_cache_manager
    allocate = manager.allocate_slots
    manager.allocate_slots = lambda *args, **kwargs: None
    for _ in range(3):
        engine.step()
        assert engine.half.pages.held == 0
        assert engine.pool.get_num_free_blocks() == 63
    manager.allocate_slots = allocate
    engine.run()
    assert engine.served["asked"].report["reused"] == 38


def test_sources_that_fill_the_pool_do_not_lock_out_the_request_that_wants_them(
    make_engine: Make,
) -> None:
    engine = make_engine(num_blocks=24)
    engine.serve("source", [*words("one", 16), *QUESTION])  # 14 of 23 pages
    second = engine.serve("second", [*words("two", 9), *QUESTION, 3])  # 10 held + 13 own: just fits
    assert second.report["reused"] == 38
    engine.half.store.clear([])
    engine.serve("source2", [*words("three", 16), *words("question2", 40)])
    third = engine.serve("third", [*words("four", 17), *words("question2", 40), 3])
    assert third.declined == ["no_room"]
    assert third.spans("computed") == [(0, 58)]
    check_idle(engine)


def test_pages_shared_with_a_running_request_cost_no_room(make_engine: Make) -> None:
    engine = make_engine(num_blocks=41)
    engine.serve("source", [*words("one", 16), *QUESTION])  # 10 pages of the question
    template = words("template", 40)
    engine.add("running", [*template, 3], words("answer", 20))  # 10 pages to share
    engine.step()
    engine.add("second", [*template, *QUESTION, *words("tail", 12)])  # 23 pages, 13 of them new
    engine.step()
    assert len(engine.served["second"].loaded) == 1
    engine.run()
    check_idle(engine)


def test_pages_are_held_from_the_plan_to_the_workers_word(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.add("second", [*words("two", 9), *QUESTION, 3])
    sources = set(pages_of(engine, "source")[5:15])  # of 16, the last one holds its answer
    engine.schedule()
    held = {block.block_id for block in engine.half.pages._held["second"]}
    assert held == sources
    assert all(engine.pool.blocks[page].ref_cnt == 1 for page in held)
    engine.drain()
    assert engine.half.pages.held == 0
    assert all(engine.pool.blocks[page].ref_cnt == 0 for page in held)


def test_an_evicted_source_is_a_miss(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.pool.evict_blocks(set(pages_of(engine, "source")))
    second = engine.serve("second", [*words("two", 9), *QUESTION, 3])
    assert second.declined == ["source_evicted"]
    assert second.loaded == []


def test_what_is_left_of_an_evicted_source_is_reused(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.pool.evict_blocks({pages_of(engine, "source")[10]})  # question tokens 20..23
    second = engine.serve("second", [*words("two", 9), *QUESTION, 3])
    assert second.spans("reused") == [(9 + 2, 9 + 20), (9 + 24, 9 + 40)]
    assert second.report["seam"] == 2, "what follows is not the beginning of common text"


def test_the_newest_pages_of_evicted_text_are_found_by_their_hash(make_engine: Make) -> None:
    """Pages are looked up when needed: who computes the same text again revives the source."""
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.pool.evict_blocks(set(pages_of(engine, "source")))
    engine.serve("again", [*words("one", 20), *QUESTION], hints={"mode": "off"})
    assert engine.serve("third", [*words("two", 9), *QUESTION, 3]).report["reused"] == 38


def test_holes_of_one_step_stay_under_the_cap(make_engine: Make) -> None:
    engine = make_engine(max_hole_tokens=25, num_blocks=128, share_inflight_seconds=0)
    engine.serve("source", [*words("one", 20), *QUESTION])
    names = [f"r{number}" for number in range(4)]
    for name in names:
        engine.add(name, [*words(name, 10), *QUESTION, 3])
    for expected in (2, 2):
        message = engine.step().kv_connector_metadata
        assert len(message.requests) == expected
        assert sum(len(hole.tokens) for ops in message.requests for hole in ops.holes) <= 25
    engine.run()
    assert all(engine.served[name].report["reused"] == 38 for name in names)


def test_plans_that_save_too_little_are_declined(make_engine: Make) -> None:
    engine = make_engine(min_reuse_tokens=39)
    engine.serve("source", [*words("one", 20), *QUESTION])
    assert engine.serve("few", [*words("two", 9), *QUESTION, 3]).declined == ["too_little"]
    engine = make_engine(min_reuse_share=0.5)
    engine.serve("source", [*words("one", 20), *QUESTION])
    assert engine.serve("half", [*words("two", 35), *QUESTION, 3]).report["reused"] == 38
    assert engine.serve("less", [*words("three", 37), *QUESTION, 3]).declined == ["too_little"]
