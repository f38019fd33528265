# SPDX-License-Identifier: Apache-2.0
"""Beside vLLM's ``OffloadingConnector``, in whichever order: what it stores under a name that
anybody can compute is exact, and of both connectors one alone loads for a request.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from checks import check_all, check_idle
from engine_beside import EngineBeside
from scripts import words
from test_random_scripts import play
from vllm.config import ModelConfig
from vllm.v1.kv_offload.base import make_offload_key

from kvcomm_vllm.compat import beside
from kvcomm_vllm.messages import WorkerFacts

Make = Callable[..., EngineBeside]

SHARED = words("shared", 40)
FIRST = [*words("one", 10), *SHARED, *words("first", 3)]
SECOND = [*words("two", 14), *SHARED, *words("second", 3)]
ORDERS = pytest.mark.parametrize("last", [False, True], ids=["ours first", "ours last"])
ENGINE = {"block_size", "num_blocks", "budget", "pipeline", "last", "chunks", "late", "seed"}


@pytest.fixture(scope="module")
def make_beside(tiny_model: ModelConfig) -> Make:
    def make(**given: Any) -> EngineBeside:
        gc.collect()
        engine = {name: value for name, value in given.items() if name in ENGINE}
        settings = {name: value for name, value in given.items() if name not in ENGINE}
        made = EngineBeside(tiny_model, settings, **engine)
        made.after_step = check_all
        return made

    return make


def fill(engine: EngineBeside, seed: str) -> None:
    """Other work takes all pages."""
    for number in range(len(engine.pool.blocks) // 8):
        engine.serve(f"{seed} {number}", words((seed, number), 40), hints={"mode": "off"})


def rest(engine: EngineBeside) -> None:
    """Step until all copies are over."""
    engine.idle()
    assert not engine.offloading.has_pending_push_work()


@ORDERS
def test_reuse_goes_on_and_all_that_is_stored_under_exact_names_is_exact(
    make_beside: Make, last: bool
) -> None:
    engine = make_beside(last=last, mode="seam")
    engine.serve("first", FIRST)
    second = engine.serve("second", SECOND, words("answer", 9))
    assert (second.report["reused"], second.report["local_approximate"]) == (38, 0)
    rest(engine)
    stored = set(engine.copies.stored)
    assert stored & engine.exact_pages.keys(), "exact pages are stored as ever"
    assert stored - engine.exact_pages.keys(), "and what is reused, under private names"
    check_idle(engine)


@ORDERS
def test_an_exact_request_loads_nothing_that_was_reused(make_beside: Make, last: bool) -> None:
    engine = make_beside(last=last, num_blocks=32, chunks=256, audits=False, heal="off")
    engine.serve("first", FIRST)
    engine.serve("second", SECOND)
    rest(engine)
    fill(engine, "fill")
    exact = engine.serve("exact", SECOND, hints={"mode": "off"})
    assert exact.report["local"] == 16, "the pages before the first that was reused"
    assert exact.outputs[0].prefill_stats.num_external_cached_tokens == 16
    rest(engine)
    check_idle(engine)


@ORDERS
def test_what_was_computed_exactly_comes_back_and_is_a_source_again(
    make_beside: Make, last: bool
) -> None:
    engine = make_beside(last=last, num_blocks=32, chunks=256)
    engine.serve("first", FIRST)
    rest(engine)
    fill(engine, "fill")
    back = engine.serve("back", [*FIRST, *words("more", 9)])
    assert back.report["local"] == len(FIRST) // 4 * 4
    assert back.loaded == []
    reader = engine.serve("reader", SECOND)
    assert reader.report["reused"] == 38
    check_idle(engine)


def test_whoever_is_listed_first_loads(make_beside: Make) -> None:
    """The other one has the prompt's beginning, and we have what follows."""
    lead = words("lead", 16)
    prompt = [*lead, *words("between", 5), *SHARED, 3]
    for last in (False, True):
        engine = make_beside(last=last, num_blocks=48, chunks=256)
        engine.serve("lead", [*lead, 5])
        rest(engine)
        fill(engine, "fill")
        engine.serve("first", FIRST)
        served = engine.serve("both", prompt)
        if last:
            assert (served.report["local"], served.report["reused"]) == (16, 0)
            assert served.declined == ["loaded_elsewhere"]
            assert served.loaded == []
        else:
            assert (served.report["local"], served.report["reused"]) == (0, 38)
        rest(engine)
        check_idle(engine)


def refuse_pages_once(engine: EngineBeside) -> None:
    manager, refusals = engine.scheduler.kv_cache_manager, iter([True])
    allocate = manager.allocate_slots

    def allocate_slots(*args: Any, **kwargs: Any) -> Any:
        return None if next(refusals, False) else allocate(*args, **kwargs)

    manager.allocate_slots = allocate_slots  # type: ignore[method-assign]


@ORDERS
def test_a_plan_that_got_no_pages_is_made_again(make_beside: Make, last: bool) -> None:
    """vLLM remembers for whom it tried: nobody stands back for an attempt that is past."""
    engine = make_beside(last=last)
    engine.serve("first", FIRST)
    refuse_pages_once(engine)
    engine.add("second", SECOND)
    engine.step()
    assert not engine.served["second"].loaded
    engine.run("second")
    assert engine.served["second"].report["reused"] == 38
    rest(engine)
    check_idle(engine)


@ORDERS
def test_a_plan_that_came_to_nothing_leaves_no_private_name(make_beside: Make, last: bool) -> None:
    """It is named for the plan, gets no pages, and is computed in the end."""
    engine = make_beside(last=last, audits=False, heal="off")
    engine.serve("first", FIRST)
    refuse_pages_once(engine)
    request = engine.add("second", SECOND)
    engine.step()
    hashes = set(map(bytes, request.block_hashes))
    assert hashes - engine.exact_pages.keys(), "it was planned"
    engine.half.states["second"].limits = None  # from now on it is served exactly
    engine.run("second")
    rest(engine)
    assert set(engine.copies.stored) <= engine.exact_pages.keys()
    assert {bytes(one) for one in request.block_hashes} <= set(engine.copies.stored)


@ORDERS
def test_a_follow_up_turn_finds_its_own_pages(make_beside: Make, last: bool) -> None:
    engine = make_beside(last=last)
    engine.serve("first", FIRST)
    answer = words("answer", 9)
    second = engine.serve("second", SECOND, answer)
    turn = engine.serve("turn", [*SECOND, *answer, *words("turn", 5)])
    assert second.report["reused"] == 38
    assert turn.report["local"] == (len(SECOND) + 8) // 4 * 4
    assert turn.report["local_approximate"] > 0
    rest(engine)
    check_idle(engine)


@ORDERS
def test_a_load_that_fails_for_good_takes_what_was_stored_of_it_along(
    make_beside: Make, last: bool
) -> None:
    engine = make_beside(last=last)
    engine.copies.strict = False
    engine.serve("first", FIRST)
    rest(engine)
    chunks = engine.offloading.connector_scheduler.manager._policy
    names = [make_offload_key(name, 0) for name in engine.copies.stored]
    assert any(chunks.get(name) for name in names)
    engine.fail = lambda ops: ops.request_id == "second"
    second = engine.serve("second", SECOND)
    assert second.declined == ["load_failed"]
    assert not any(chunks.get(name) for name in names)
    rest(engine)
    fill(engine, "fill")
    engine.fail = lambda ops: False
    again = engine.serve("again", SECOND, hints={"mode": "off"})
    assert again.report["reused"] == 0
    check_idle(engine)


@ORDERS
def test_a_reset_leaves_a_request_alone_that_the_other_one_loads(
    make_beside: Make, last: bool
) -> None:
    """Once its own load has failed, which is what our part of a reset looks for."""
    engine = make_beside(last=last, num_blocks=32, chunks=256)
    engine.serve("lead", FIRST)
    rest(engine)
    fill(engine, "fill")
    engine.add("back", [*FIRST, *words("more", 9)])
    while not engine.others_load:
        engine.schedule()
    engine.half.states["back"].failed = True
    with pytest.raises(RuntimeError, match="remote KV"):  # as vLLM has it
        engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.drain()
    engine.run("back")
    check_idle(engine)


def as_late_as_may_be(engine: EngineBeside) -> None:
    """Copies that begin from now on end when they are waited for, or after a long time."""
    engine.copies.most_steps = 60
    engine.copies.take = max


@ORDERS
def test_lessons_take_no_page_that_is_still_to_be_copied(make_beside: Make, last: bool) -> None:
    engine = make_beside(last=last)
    engine.serve("first", FIRST)
    as_late_as_may_be(engine)
    engine.serve("second", SECOND)
    waited = 0
    while engine.offloading.has_pending_push_work():
        engine.step()
        waited += 1
        assert not engine.lessons
    assert waited > 30
    engine.idle()
    assert engine.lessons


@ORDERS
def test_no_lesson_begins_in_the_step_that_tells_of_a_requests_end(
    make_beside: Make, last: bool
) -> None:
    """Whoever is asked behind us may store some of its pages then, which are free already."""
    engine = make_beside(last=last, late=0)
    engine.serve("first", FIRST)
    engine.serve("second", SECOND, words("answer", 9))
    assert not engine.offloading.has_pending_push_work()
    output = engine.schedule()
    assert output.finished_req_ids == {"second"}
    assert not engine.lessons
    engine.idle()
    assert engine.lessons


@ORDERS
def test_pages_of_a_request_that_waits_for_its_pieces_are_copied_before_they_are_written(
    make_beside: Make, last: bool
) -> None:
    engine = make_beside(last=last, num_blocks=34, budget=16, audits=False, heal="off")
    engine.serve("source", FIRST, hints={"mode": "off"})
    rest(engine)
    as_late_as_may_be(engine)
    engine.serve("other", words("other", 40), hints={"mode": "off"})
    begun = dict(engine.copies.going)
    assert begun
    late = engine.add("late", [*words("late", 26), *SHARED, 3])
    while not engine.half.states["late"].awaited:
        engine.step()
    table = set(engine.scheduler.kv_cache_manager.get_block_ids("late")[0])
    pages = {page for job in begun.values() for page in job.src_spec.block_ids.tolist()}
    assert table & pages, "it has been given pages that were still to be copied"
    engine.run("late")
    assert late.num_output_tokens == 2
    rest(engine)


@ORDERS
def test_reports_stand_beside_what_the_other_one_tells(make_beside: Make, last: bool) -> None:
    engine = make_beside(last=last)
    theirs = {"remote": [1, 2]}
    engine.offloading.request_finished = lambda *_: (False, dict(theirs))
    engine.serve("first", FIRST)
    second = engine.serve("second", SECOND)
    *_, end = second.outputs
    assert end.kv_transfer_params is not None
    assert end.kv_transfer_params.keys() == {"kvcomm", "remote"}
    assert second.report["reused"] == 38


def test_beside_what_is_not_understood_our_part_does_nothing(
    make_beside: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a configuration that was put together by hand; a command line's leaves it out."""
    monkeypatch.setattr(beside, "is_understood", lambda kind: False)
    engine = make_beside()
    assert engine.half.off == "other_connector"
    engine.serve("first", FIRST)
    second = engine.serve("second", SECOND)
    assert (second.report["reused"], second.report["declined"]) == (0, {"other_connector": 1})


def test_workers_words_reach_the_part_they_are_for(make_beside: Make) -> None:
    engine = make_beside()
    assert engine.half.off is None, "ours has heard that workers can reuse"
    told: list[Any] = []
    engine.offloading.set_xfer_handshake_metadata = told.append
    parent = engine.scheduler.connector
    assert parent is not None
    facts = WorkerFacts("unknown_layout", "", "test")
    ours = engine.connector
    ours.get_handshake_metadata = lambda: facts  # type: ignore[method-assign]
    engine.offloading.get_handshake_metadata = lambda: "theirs"
    said = parent.get_handshake_metadata()
    parent.set_xfer_handshake_metadata_pp_aware({(0, 0): said})
    assert told == [{0: "theirs"}]
    assert engine.half.off == "unknown_layout"
    engine.offloading.get_handshake_metadata = lambda: None
    parent.set_xfer_handshake_metadata_pp_aware({(0, 0): parent.get_handshake_metadata()})
    assert told[1:] == [{}], "who has said nothing hears of nobody"


@pytest.mark.slow
@ORDERS
@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_no_script_stores_or_reads_what_is_not_exact_under_an_exact_name(
    make_beside: Make, last: bool, pipeline: int, seed: int
) -> None:
    size = [4, 8][seed % 2]
    engine = make_beside(
        last=last,
        pipeline=pipeline,
        seed=seed,
        block_size=size,
        num_blocks=[30, 64][seed // 2 % 2],
        budget=[16, 128][seed % 2],
        chunks=40,
    )
    play(engine, seed, steps=200)
    assert not engine.offloading.has_pending_push_work()


@pytest.mark.slow
@ORDERS
@pytest.mark.parametrize("seed", range(3))
def test_no_script_with_failing_loads_reads_what_is_not_there(
    make_beside: Make, last: bool, seed: int
) -> None:
    engine = make_beside(last=last, seed=seed, num_blocks=40, chunks=40)
    engine.copies.strict = False
    play(engine, seed, steps=150, failures=True)
