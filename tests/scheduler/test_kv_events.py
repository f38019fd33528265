# SPDX-License-Identifier: Apache-2.0
"""Who listens to vLLM's KV events hears of the pages that everybody can find, and of no others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from checks import check_all, check_idle
from checks import exactly_hashed as exact_names
from engine_without_worker import EngineWithoutWorker
from scripts import words
from since import since
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash as external

Make = Callable[..., EngineWithoutWorker]

SHARED = words("shared", 40)
SOURCE = [*words("one", 20), *SHARED, 5]
READER = [*words("reader", 10), *SHARED, 7, 8, 9]
ANSWER = words("answer", 9)
pipelines = pytest.mark.parametrize("pipeline", [1, 2])


def exactly_hashed(engine: EngineWithoutWorker) -> set[Any]:
    """Pages that anybody can look up, as events name them."""
    return set(map(external, exact_names(engine)))


def exact_pages(engine: EngineWithoutWorker) -> dict[Any, Any]:
    return {external(name): page for name, page in engine.exact_pages.items()}


class Router:
    """Knows of an engine's cache what its events tell: copies of each page, by hash."""

    def __init__(self, engine: EngineWithoutWorker) -> None:
        self.engine = engine
        self.pages: Counter[Any] = Counter()

    def listen(self) -> list[Any]:
        """Take new events in; each must be about pages with an exact hash, and make sense."""
        events, self.engine.published = self.engine.published, []
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.pages.clear()
            elif isinstance(event, BlockRemoved):
                for name in event.block_hashes:
                    assert self.pages[name] > 0, "gone is what was never there"
                    self.pages[name] -= 1
            else:
                self.store(event)
        return events

    def store(self, event: BlockStored) -> None:
        exact, size = exact_pages(self.engine), event.block_size
        assert event.block_hashes
        assert len(event.token_ids) == len(event.block_hashes) * size
        assert event.extra_keys is None or len(event.extra_keys) == len(event.block_hashes)
        parent = event.parent_block_hash
        for number, name in enumerate(event.block_hashes):
            text, index = exact[name]
            tokens = text.tokens[index * size : (index + 1) * size].tolist()
            assert event.token_ids[number * size : (number + 1) * size] == tokens
            if index:
                assert parent is not None
                assert exact[parent][1] == index - 1
            else:
                assert parent is None
            self.pages[name] += 1
            parent = name

    @property
    def known(self) -> set[Any]:
        return {name for name, copies in self.pages.items() if copies}


def listened(make_engine: Make, **options: Any) -> tuple[EngineWithoutWorker, Router]:
    engine = make_engine(**{"events": True, "heal": "off", "compares": False} | options)
    return engine, Router(engine)


@pipelines
def test_a_router_knows_exactly_what_everybody_can_find(make_engine: Make, pipeline: int) -> None:
    engine, router = listened(make_engine, pipeline=pipeline, num_blocks=256)
    engine.serve("source", SOURCE)
    turn = engine.serve("turn", READER, ANSWER)
    assert turn.report["reused"] > 0
    follow_up = engine.serve("next", [*READER, *ANSWER, *words("more", 20)])
    assert follow_up.report["local"] > len(SHARED)
    router.listen()
    exact = sum(len(served.text.tokens) for served in engine.served.values())
    assert len(router.known) < exact // engine.block_size, "private pages are left out"
    assert router.known == exactly_hashed(engine)
    check_idle(engine)


@pipelines
def test_no_event_is_about_a_page_nobody_has_heard_of_though_pages_are_evicted(
    make_engine: Make, pipeline: int
) -> None:
    engine, router = listened(make_engine, pipeline=pipeline, num_blocks=40)
    for number in range(12):
        question = words(("question", number % 3), 30)
        engine.serve(f"source{number}", [*words(("one", number), 9), *question, 5])
        engine.serve(f"reader{number}", [*words(("two", number), 9), *question, 7], ANSWER)
        engine.serve(f"plain{number}", words(("plain", number), 60), hints={"mode": "off"})
        router.listen()
    assert sum(served.report["reused"] > 0 for served in engine.served.values()) > 3
    assert exactly_hashed(engine) == router.known
    check_idle(engine)


@since("0.32", "one seed for the hashes of all engines")
def test_without_reuse_events_are_vllms_own(make_engine: Make, plain_engine: Make) -> None:
    heard = []
    for make in (make_engine, plain_engine):
        engine = make(events=True, num_blocks=40)
        hints = {"hints": {"mode": "off"}} if engine.scheduler.connector else {}
        for number in range(6):
            engine.serve(f"r{number}", words(number % 4, 70), ANSWER, salt="a", **hints)
        heard.append([(type(event), list(event.block_hashes)) for event in engine.published])
        assert {type(event) for event in engine.published} == {BlockStored, BlockRemoved}
    assert heard[0] == heard[1]


def test_healed_pages_are_told_of_when_they_are_exact(make_engine: Make) -> None:
    engine, router = listened(make_engine, num_blocks=256, heal="idle")
    engine.serve("source", SOURCE)
    assert engine.serve("turn", READER, ANSWER).report["reused"] > 0
    router.listen()
    before = router.known
    engine.idle()
    events = router.listen()
    assert {type(event) for event in events} == {BlockStored}
    full = (len(READER) + len(ANSWER) - 1) // engine.block_size
    turn = {
        name
        for name, (text, index) in exact_pages(engine).items()
        if text is engine.served["turn"].text and index < full
    }
    assert turn - before
    assert turn <= router.known == exactly_hashed(engine)
    check_idle(engine)


def test_a_tenants_pages_are_told_under_its_salt_alone(make_engine: Make) -> None:
    """vLLM's events name the salt with a prompt's first page, as without us; and private pages,
    salted or not, are in none.
    """
    engine, router = listened(make_engine, num_blocks=256)
    engine.serve("source", SOURCE, salt="tenant")
    engine.serve("turn", READER, ANSWER, salt="tenant")
    events = router.listen()
    told = [token for event in events for token in event.token_ids]
    assert router.known == exactly_hashed(engine)
    assert len(told) == len(router.known) * engine.block_size
    first = [event for event in events if event.parent_block_hash is None]
    assert {event.extra_keys[0] for event in first} == {("tenant",)}


@pipelines
def test_a_reset_in_between_leaves_no_page_behind(make_engine: Make, pipeline: int) -> None:
    engine, router = listened(make_engine, pipeline=pipeline, num_blocks=40)
    for number in range(4):
        engine.serve(f"source{number}", SOURCE)
        engine.serve(f"turn{number}", READER, ANSWER)
        engine.serve(f"other{number}", words(("other", number), 90))
        assert engine.scheduler.reset_prefix_cache()
        engine.serve(f"source again{number}", SOURCE)
        assert engine.serve(f"again{number}", READER, ANSWER).report["reused"] > 0
        router.listen()
        assert router.known == exactly_hashed(engine)
    check_idle(engine)


@pipelines
def test_a_plan_over_several_steps_a_failed_load_and_a_hang_up_are_told_as_they_end(
    make_engine: Make, pipeline: int
) -> None:
    engine, router = listened(make_engine, pipeline=pipeline, num_blocks=256, budget=64)
    engine.after_step = check_all
    long = words("shared", 80)
    engine.serve("source", [*words("one", 20), *long])
    engine.serve("large", [*words("instructions", 150), *long, 7], ANSWER)
    engine.add("gone", [*words("others", 150), *long, 8])
    for _ in range(3):
        engine.step()
    engine.abort("gone")
    engine.idle()
    if pipeline == 1:
        engine.fail = lambda ops: True
        engine.serve("failed", [*words("third", 9), *long, 9], ANSWER)
    engine.serve("last", words("last", 20))
    router.listen()
    assert router.known == exactly_hashed(engine)
    check_idle(engine)


def test_pages_found_again_are_told_without_the_private_ones(make_engine: Make) -> None:
    """``kv_cache_report_mode: full``: vLLM tells of each prefix hit once more."""
    engine, router = listened(make_engine, num_blocks=256)
    engine.serve("source", SOURCE)
    reader = [*words("reader", 18), *SHARED, 7, 8, 9]
    engine.serve("turn", reader, ANSWER)
    router.listen()
    request = engine.add("next", [*reader, *ANSWER, *words("more", 20)])
    request.kv_cache_report_mode = "full"
    engine.run()
    assert engine.served["next"].report["local"] > 40
    again = router.listen()[0]
    assert again.parent_block_hash is None
    assert again.token_ids == reader[:20], "its own text and the seam, before what was reused"


def test_nothing_is_wrapped_where_nobody_listens(make_engine: Make) -> None:
    pool = make_engine().pool
    assert not {"take_events", "cache_full_blocks", "emit_cached_block_events"} & vars(pool).keys()
