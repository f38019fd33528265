# SPDX-License-Identifier: Apache-2.0
"""From arrival to end: chunked prefill, aborts, preemption, children, resets, bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
READER = [*words("two", 9), *QUESTION, *words("tail", 7)]


def owners(engine: EngineWithoutWorker) -> list[str]:
    return [sequence.owner for sequence in engine.half.store.index._row_of]


def test_a_chunked_prompt_is_not_read_before_its_last_chunk(make_engine: Make) -> None:
    engine = make_engine(budget=16)
    engine.add("long", [*words("one", 20), *QUESTION])
    for _ in range(3):
        engine.step()
    engine.add("second", READER)
    engine.step()  # the last chunk of "long"
    assert engine.served["second"].loaded == []
    engine.run("second")
    assert engine.served["second"].report["reused"] == 38


def test_a_tail_longer_than_the_budget_is_computed_in_chunks(make_engine: Make) -> None:
    engine = make_engine(budget=16)
    engine.serve("source", [*words("one", 20), *QUESTION])
    long_tail = engine.serve("second", [*words("two", 9), *QUESTION, *words("tail", 50)])
    assert long_tail.spans("reused") == [(11, 49)]
    assert len(long_tail.loaded) == 1
    check_idle(engine)


def test_text_of_a_chunked_reuser_is_findable_only_with_its_last_chunk(make_engine: Make) -> None:
    """Loaded in the first step, its tail is computed over several."""
    engine = make_engine(budget=16)
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.add("second", [*words("two", 9), *QUESTION, *words("tail", 50)])
    ready = []
    while "second" not in [s.owner for s in engine.half.store.index._row_of if s.ready]:
        engine.step()
        ready.append(engine.scheduler.requests["second"].num_computed_tokens)
    assert ready[-1] >= 99
    assert all(count < 99 for count in ready[:-1])


def test_an_abort_while_waiting_leaves_nothing(make_engine: Make) -> None:
    engine = make_engine(max_num_seqs=1)
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.add("running", words("running", 20), words("answer", 9))
    engine.step()
    engine.add("waiting", READER)
    engine.step()
    engine.abort("waiting")
    engine.run()
    assert owners(engine) == ["source", "running"]
    check_idle(engine)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_an_abort_in_flight_keeps_the_sources_until_the_workers_answer(
    make_engine: Make, pipeline: int
) -> None:
    engine = make_engine(pipeline=pipeline)
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.add("second", [*READER, 3, 4])  # all its full pages were to be written by this step
    engine.schedule()
    engine.abort("second")
    assert "second" not in owners(engine), "nobody has said yet that the load went well"
    assert engine.half.pages.held == 10
    engine.drain()
    assert engine.half.pages.held == 0
    engine.step()
    check_idle(engine)


def test_pages_of_an_ended_request_are_free_at_once_beside_a_step_in_flight(
    make_engine: Make,
) -> None:
    """For a consumer vLLM would hold them back until that step has ended; what we write is on the
    stream before what the next step writes there.
    """
    engine = make_engine(pipeline=2)
    assert engine.scheduler.vllm_config.max_concurrent_batches == 2
    free = engine.pool.get_num_free_blocks()
    engine.add("one", [*words("one", 20), *QUESTION])
    engine.schedule()
    assert engine.pool.get_num_free_blocks() < free
    engine.abort("one")
    assert engine.pool.get_num_free_blocks() == free
    engine.drain()


def test_an_abort_of_a_half_filled_prompt_forgets_it(make_engine: Make) -> None:
    engine = make_engine(budget=16)
    engine.add("long", [*words("one", 20), *QUESTION])
    engine.step()
    engine.abort("long")
    assert owners(engine) == []
    assert engine.serve("second", READER).loaded == []


def test_an_abort_while_answering_keeps_what_was_computed(make_engine: Make) -> None:
    engine = make_engine()
    engine.add("speaker", [*words("one", 20), *QUESTION], words("answer", 50))
    for _ in range(21):
        engine.step()
    engine.abort("speaker")
    listener = [*words("two", 9), *words("answer", 50)]
    assert engine.serve("listener", listener).spans("reused") == [(9 + 2, 9 + 20)]


def preempt(engine: EngineWithoutWorker, name: str) -> None:
    """As vLLM does when it runs out of pages."""
    request = engine.scheduler.requests[name]
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)


def test_a_preempted_request_finds_its_own_private_pages(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.add("second", READER, words("answer", 20))
    for _ in range(6):
        engine.step()
    preempt(engine, "second")
    output = engine.step()
    # 56 of the prompt and 5 of the answer have KV: 15 full pages
    assert output.num_scheduled_tokens == {"second": 62 - 60}
    engine.run()
    second = engine.served["second"]
    assert len(second.loaded) == 1, "no second load"
    assert second.spans("reused") == [(11, 49)]
    check_idle(engine)


def test_a_preempted_request_whose_pages_are_gone_is_planned_again(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.add("second", READER, words("answer", 20))
    for _ in range(6):
        engine.step()
    engine.pool.evict_blocks(set(engine.scheduler.kv_cache_manager.get_block_ids("second")[0]))
    preempt(engine, "second")
    engine.run()
    assert len(engine.served["second"].loaded) == 2
    assert engine.served["second"].spans("reused") == [(11, 49)]
    check_idle(engine)


def test_a_preempted_prefill_is_not_a_source(make_engine: Make) -> None:
    engine = make_engine(budget=16, max_num_seqs=1)
    engine.add("long", [*words("one", 20), *QUESTION])
    engine.step()
    preempt(engine, "long")
    engine.add("second", READER, priority=0)
    assert engine.half.match(engine.scheduler.requests["second"], 0)[0] in (0, None)
    engine.run()
    check_idle(engine)


def test_children_of_one_prompt_share_its_private_pages(make_engine: Make) -> None:
    """n > 1: vLLM's front end makes one request per sample."""
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION])
    for child in range(3):
        engine.add(f"{child}_n", READER, words(("sample", child), 9))
    engine.run()
    loads = [len(engine.served[f"{child}_n"].loaded) for child in range(3)]
    local = [engine.served[f"{child}_n"].report["local"] for child in range(3)]
    assert loads == [1, 0, 0]
    assert local == [0, 52, 52]
    check_idle(engine)


@pytest.mark.parametrize("connector_too", [False, True])
def test_a_reset_of_the_prefix_cache_empties_the_index(
    make_engine: Make, connector_too: bool
) -> None:
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION])
    assert engine.scheduler.reset_prefix_cache(reset_connector=connector_too)
    assert engine.serve("second", READER).declined == ["no_match"]
    assert owners(engine) == ["second"]


def test_a_reset_under_running_requests_lets_them_finish(make_engine: Make) -> None:
    engine = make_engine()
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.add("second", READER, words("answer", 9))
    engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    engine.run()
    assert engine.served["second"].finished
    check_idle(engine)


def test_the_index_keeps_no_more_sequences_than_allowed(make_engine: Make) -> None:
    engine = make_engine(max_sequences=3, num_blocks=200)
    for number in range(6):
        engine.serve(f"r{number}", words(number, 20))
    assert owners(engine) == ["r3", "r4", "r5"]


def test_a_source_in_use_is_not_the_next_to_be_forgotten(make_engine: Make) -> None:
    engine = make_engine(max_sequences=3, num_blocks=200)
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.serve("other", words("other", 20))
    engine.serve("reader", READER)
    engine.serve("new", words("new", 20))
    assert "source" in owners(engine)
    assert "other" not in owners(engine)


def test_sequences_without_pages_are_swept_out(make_engine: Make) -> None:
    engine = make_engine(num_blocks=64)
    for number in range(60):
        engine.serve(f"r{number}", words(number, 30))
    assert len(owners(engine)) < 20
    engine.pool.evict_blocks(set(range(64)))
    for number in range(20):
        engine.serve(f"late{number}", [3, number])  # too short to be stored
    engine.serve("last", words("last", 30))
    for number in range(12):
        engine.serve(f"sweep{number}", words(("sweep", number), 30))
    assert not any(name.startswith("r") for name in owners(engine))


def test_requests_of_less_than_a_page_are_served(make_engine: Make) -> None:
    engine = make_engine(block_size=16)
    for length in (1, 2, 15):
        engine.serve(f"r{length}", words("short", length), words("answer", 3))
    check_idle(engine)
