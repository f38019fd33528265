# SPDX-License-Identifier: Apache-2.0
"""The request counter says what became of each request, and calls nothing a failure but one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from checks import check_all, check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words

from kvcomm_vllm.metrics import KVCommStats

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
READER = [*words("two", 9), *QUESTION, *words("tail", 7)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The outcome under which each request was counted."""
    found: dict[str, str] = {}
    monkeypatch.setattr(
        KVCommStats, "count_request", lambda stats, state: found.update({state.id: state.outcome})
    )
    return found


@pytest.fixture
def with_source(make_engine: Make, counted: dict[str, str]) -> Make:
    def make(**given: Any) -> EngineWithoutWorker:
        engine = make_engine(**given)
        engine.serve("source", [*words("one", 20), *QUESTION])
        assert counted == {"source": "declined"}
        counted.clear()
        return engine

    return make


def test_requests_that_are_served_to_their_end(with_source: Make, counted: dict[str, str]) -> None:
    engine = with_source()
    engine.serve("second", READER)
    engine.serve("third", [*words("3", 9), *QUESTION, 3], hints={"mode": "off"})
    assert counted == {"second": "reused", "third": "off"}


def test_a_client_that_hangs_up_in_the_queue_is_neither_declined_nor_failed(
    with_source: Make, counted: dict[str, str]
) -> None:
    engine = with_source(max_num_seqs=1)
    engine.add("running", words("running", 20), words("answer", 9))
    engine.step()
    engine.add("waiting", READER)
    engine.step()
    engine.abort("waiting")
    assert counted == {"waiting": "aborted"}
    engine.run()
    check_idle(engine)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_client_that_hangs_up_while_its_loads_are_on_their_way_is_no_failure(
    with_source: Make, counted: dict[str, str], pipeline: int
) -> None:
    engine = with_source(pipeline=pipeline)
    engine.add("second", READER)
    engine.schedule()
    engine.abort("second")
    engine.drain()
    engine.step()
    assert counted == {"second": "aborted"}
    check_idle(engine)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_pages_of_a_load_that_fails_after_its_client_has_gone_are_forgotten(
    make_engine: Make, pipeline: int
) -> None:
    """Its pages bear exact hashes from the start, and nobody else will ever write them."""
    engine = make_engine(pipeline=pipeline)
    prompt = words("prompt", 60)
    engine.serve("source", prompt)
    lost = engine.half.pages.lookup(next(iter(engine.half.store.index._row_of)).block_hashes[3])
    assert lost is not None
    engine.pool.evict_blocks({lost.block_id})
    engine.fail = lambda request: True
    engine.add("second", [*prompt, *words("more", 12)])
    engine.schedule()
    engine.abort("second")
    engine.drain()
    check_all(engine)
    engine.fail = lambda request: False
    engine.serve("third", [*prompt, *words("more", 12)])
    check_idle(engine)


def test_a_client_that_hangs_up_later_counts_as_it_was_served(
    with_source: Make, counted: dict[str, str]
) -> None:
    engine = with_source()
    prompts = {"second": READER, "third": words("new", 30), "fourth": words("other", 30)}
    hints = {"fourth": {"mode": "off"}}
    for name, prompt in prompts.items():
        engine.add(name, prompt, words(name, 20), hints=hints.get(name))
    engine.step()
    engine.step()
    for name in prompts:
        engine.abort(name)
    assert counted == {"second": "reused", "third": "declined", "fourth": "off"}


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_load_that_fails_is_a_failure_whether_vllm_recovers_or_not(
    with_source: Make, counted: dict[str, str], pipeline: int
) -> None:
    """With steps in flight (pipeline 2) vLLM ends the request, before it tells us why."""
    engine = with_source(pipeline=pipeline)
    engine.fail = lambda request: True
    engine.serve("second", READER, [1])  # no step follows that would read what was not loaded
    assert counted == {"second": "failed"}
    check_idle(engine)


def test_a_client_that_hangs_up_after_its_load_failed_is_still_a_failure(
    with_source: Make, counted: dict[str, str]
) -> None:
    engine = with_source()
    engine.fail = lambda request: True
    engine.add("second", READER, words("answer", 6))
    engine.step()
    engine.abort("second")
    assert counted == {"second": "failed"}


def test_a_failure_after_preemption_is_one_even_if_nothing_was_reused_at_first(
    make_engine: Make,
    counted: dict[str, str],
) -> None:
    engine = make_engine(share_inflight_seconds=0)
    engine.add("second", READER, words("answer", 9))
    engine.step()
    engine.serve("source", [*words("one", 20), *QUESTION])
    request = engine.scheduler.requests["second"]
    blocks = engine.scheduler.kv_cache_manager.get_block_ids("second")[0]
    engine.pool.evict_blocks(set(blocks))
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    engine.fail = lambda request: True
    counted.clear()
    engine.run()
    assert counted == {"second": "failed"}
