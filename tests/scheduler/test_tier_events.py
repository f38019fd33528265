# SPDX-License-Identifier: Apache-2.0
"""Who listens to vLLM's KV events hears where exact pages lie, in the KV cache or in the host pool,
and of private ones nowhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checks import check_idle
from checks import exactly_hashed as exact_names
from engine_without_worker import EngineWithoutWorker
from scripts import words
from vllm.distributed.kv_events import (
    MEDIUM_CPU,
    MEDIUM_GPU,
    MEDIUM_STORAGE,
    AllBlocksCleared,
    BlockRemoved,
)
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash as external
from vllm.v1.kv_offload.base import Medium, OffloadingEvent

from kvcomm_vllm.compat.offload import in_pool, key_of
from kvcomm_vllm.scheduler.tiers.events import TierEvents
from kvcomm_vllm.scheduler.tiers.wanted import Text, chain

Make = Callable[..., EngineWithoutWorker]

SHARED = words("shared", 48)
ANSWER = words("answer", 9)
pipelines = pytest.mark.parametrize("pipeline", [1, 2])


class Listener:
    """Takes pages to lie where events tell, and checks what they tell of them."""

    def __init__(self, engine: EngineWithoutWorker) -> None:
        self.engine = engine
        self.pages: dict[str, Counter[Any]] = {}

    def listen(self) -> list[Any]:
        events, self.engine.published = self.engine.published, []
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.pages.pop(MEDIUM_GPU, None)
                continue
            there = self.pages.setdefault(event.medium, Counter())
            if isinstance(event, BlockRemoved):
                there.subtract(event.block_hashes)
                assert min(there.values()) >= 0, "gone is what was never there"
            else:
                self.check(event)
                there.update(event.block_hashes)
        return events

    def check(self, event: Any) -> None:
        pages = {external(name): page for name, page in self.engine.exact_pages.items()}
        size, parent = event.block_size, event.parent_block_hash
        assert len(event.token_ids) == size * len(event.block_hashes)
        assert event.group_idx == 0
        for number, name in enumerate(event.block_hashes):
            text, index = pages[name]
            told = event.token_ids[number * size : (number + 1) * size]
            assert told == text.tokens[index * size : (index + 1) * size].tolist()
            assert (parent is None) == (index == 0)
            assert parent is None or pages[parent][1] == index - 1
            parent = name

    def known(self, medium: str) -> set[Any]:
        return set(+self.pages.get(medium, Counter()))

    def knows_all(self) -> None:
        self.listen()
        engine = self.engine
        assert self.known(MEDIUM_GPU) == set(map(external, exact_names(engine)))
        assert self.known(MEDIUM_CPU) == set(map(external, pooled(engine)))
        copies = self.pages.get(MEDIUM_CPU, Counter())
        assert max(copies.values(), default=0) <= 1, "a page lies there once"


def pooled(engine: EngineWithoutWorker) -> set[bytes]:
    """Exact pages in the pool."""
    manager = engine.half.tiers._manager
    return {name for name in engine.exact_pages if in_pool(manager, name)}


def listened(make_engine: Make, **options: Any) -> tuple[EngineWithoutWorker, Listener]:
    given = {"events": True, "audits": False, "heal": "off", "num_blocks": 48}
    engine = make_engine(**{"tiers": {"host_gb": 0.002}, **given, **options})
    return engine, Listener(engine)


def fill(engine: EngineWithoutWorker, seed: object) -> None:
    """Other work takes all pages."""
    for number in range(3):
        engine.serve(f"{seed} {number}", words((seed, number), 150))
    engine.idle()


@pipelines
def test_where_exact_pages_lie_is_told_and_private_ones_are_not(
    make_engine: Make, pipeline: int
) -> None:
    engine, listener = listened(make_engine, pipeline=pipeline)
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    assert engine.serve("b", words("c", 24) + SHARED + words("d", 3), ANSWER).report["reused"]
    engine.idle()
    listener.knows_all()
    kept = len(listener.known(MEDIUM_CPU))
    assert 0 < kept < len(engine.host_pool.chunks), "private pages lie there, too"
    check_idle(engine)


@pipelines
def test_a_page_that_comes_back_is_in_the_cache_again(make_engine: Make, pipeline: int) -> None:
    engine, listener = listened(make_engine, pipeline=pipeline)
    prompt = words("a", 20) + SHARED
    engine.serve("a", prompt + words("b", 3), salt="one")
    fill(engine, "other")
    listener.knows_all()
    gone = {external(name) for name in list(engine.exact_pages)[:17]}
    assert not gone & listener.known(MEDIUM_GPU)
    assert engine.serve("b", prompt + words("d", 9), salt="one").report["local"] == 68
    listener.knows_all()
    assert gone <= listener.known(MEDIUM_GPU)
    fill(engine, "more")
    assert engine.serve("c", words("c", 24) + SHARED, salt="one").report["reused"]
    listener.knows_all()
    fill(engine, "most")
    listener.knows_all()
    check_idle(engine)


def test_what_has_left_a_small_pool_is_told_and_what_is_quoted_from_it(make_engine: Make) -> None:
    engine, listener = listened(make_engine, tiers={"host_gb": 60 * 4096 / 2**30})
    for number in range(12):
        shared = words(("shared", number % 4), 48)
        engine.serve(f"a{number}", [*words(("a", number), 21), *shared, 5], ANSWER)
        engine.serve(f"b{number}", [*words(("b", number), 10), *shared, 7], ANSWER)
        engine.serve(f"c{number}", words(("c", number % 3), 60), hints={"mode": "off"})
        engine.idle()
        listener.knows_all()
    assert any(served.report["reused"] for served in engine.served.values())
    check_idle(engine)


def test_a_first_page_is_told_with_its_salt_wherever_it_lies(make_engine: Make) -> None:
    engine, listener = listened(make_engine)
    prompt = words("a", 20) + SHARED
    engine.serve("a", prompt, salt="one")
    fill(engine, "other")
    engine.serve("b", prompt + words("d", 9), salt="one")
    first = [event for event in listener.listen() if getattr(event, "extra_keys", None)]
    salted = [event for event in first if event.extra_keys[0] == ("one",)]
    assert [event.medium for event in salted] == [MEDIUM_GPU, MEDIUM_CPU, MEDIUM_GPU]
    assert all(event.parent_block_hash is None for event in salted)


def test_healed_pages_are_told_of_in_the_pool_too(make_engine: Make) -> None:
    engine, listener = listened(make_engine, heal="idle", compares=False, num_blocks=256)
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    assert engine.serve("b", words("c", 24) + SHARED + words("d", 3), ANSWER).report["reused"]
    engine.idle()
    listener.knows_all()
    text = engine.served["b"].text
    healed = {external(n) for n, (of, page) in engine.exact_pages.items() if of is text}
    assert len(healed & listener.known(MEDIUM_CPU)) >= 18
    check_idle(engine)


def test_copies_that_fail_are_not_told(make_engine: Make) -> None:
    engine, listener = listened(make_engine)
    engine.host_pool.fail = lambda op: True
    engine.serve("a", words("a", 20) + SHARED)
    engine.idle()
    listener.knows_all()
    assert not listener.known(MEDIUM_CPU)
    engine.host_pool.fail = lambda op: False
    engine.serve("b", words("a", 20) + SHARED)
    engine.idle()
    listener.knows_all()
    assert listener.known(MEDIUM_CPU)


@pipelines
@pytest.mark.parametrize("while_copying", [False, True])
def test_after_a_reset_nothing_lies_anywhere(
    make_engine: Make, pipeline: int, while_copying: bool
) -> None:
    engine, listener = listened(make_engine, pipeline=pipeline)
    engine.serve("a", words("a", 20) + SHARED)
    engine.idle()
    listener.knows_all()
    engine.host_pool.most_steps = 5
    engine.serve("b", words("b", 20) + SHARED, ANSWER)
    if not while_copying:
        engine.idle()
    assert engine.scheduler.reset_prefix_cache()
    engine.half.reset()
    engine.memory.weights_now += 1
    engine.idle()
    engine.serve("c", words("c", 9))
    engine.idle()
    listener.listen()
    listener.knows_all()
    engine.serve("d", words("a", 20) + SHARED)
    engine.idle()
    listener.knows_all()
    assert listener.known(MEDIUM_CPU)


def test_other_tiers_events_are_passed_on_for_exact_pages_alone(make_engine: Make) -> None:
    engine, listener = listened(make_engine)
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    engine.serve("b", words("c", 24) + SHARED + words("d", 3), ANSWER)
    engine.idle()
    names = {n for s in engine.half.store.index._row_of for n in s.block_hashes}
    keys = [key_of(name) for name in sorted(names)]
    manager = engine.half.tiers._manager
    exact = listener.listen() and listener.known(MEDIUM_CPU)
    for removed in (False, True):
        event = OffloadingEvent(
            keys, Medium.STORAGE, removed, ownership="store", removal_expected=True
        )
        manager.primary_tier.events.append(event)
        engine.serve(f"c{removed}", words("c", 5))
        events = [event for event in listener.listen() if event.medium == MEDIUM_STORAGE]
        assert {event.ownership for event in events} == {"store"}
        assert listener.known(MEDIUM_STORAGE) == (set() if removed else exact)
    assert len(exact) < len(keys)


def test_a_page_from_behind_the_pool_is_told_as_far_as_who_waits_for_it_knows_it() -> None:
    text = Text([b"a" * 32, b"b" * 32, b"c" * 32], np.arange(11, dtype=np.int32), 11, "salt")
    wanted = chain(text, 1, 4)
    events = TierEvents([lambda name: None, lambda name: wanted.exact(name, 4)])
    keys = [key_of(letter * 32) for letter in (b"b", b"c", b"x")]
    for removed in (False, True):
        (told,) = events.take([OffloadingEvent(keys, Medium.CPU, removed)])
        assert told.block_hashes == [external(b"b" * 32)], "the last page is not full"
        assert told.medium == MEDIUM_CPU
        if not removed:
            assert (told.parent_block_hash, told.token_ids) == (external(b"a" * 32), [4, 5, 6, 7])
            assert told.extra_keys == [None]
    assert not events._pages


@pytest.mark.parametrize("exact", range(13))
def test_of_a_text_that_is_partly_exact_only_full_pages_before_that_are_told(exact: int) -> None:
    names = [b"a", b"b", b"c"]
    text = Text(names, np.arange(12, dtype=np.int32), exact, None)
    told = [text.page(name, 4) is not None for name in names]
    assert told == [exact >= 4, exact >= 8, exact >= 12]


def test_nothing_is_kept_in_mind_where_nobody_listens(make_engine: Make) -> None:
    engine, _ = listened(make_engine, events=False)
    engine.serve("a", words("a", 20) + SHARED)
    fill(engine, "other")
    engine.serve("b", words("a", 20) + SHARED + words("d", 9))
    engine.idle()
    assert not engine.half.tiers._events._pages
    alone = make_engine(events=True)
    alone.serve("a", words("a", 20))
    assert alone.published
    assert not alone.half.pages.events._told, "there are no tiers to tell of"
    assert not list(engine.connector.take_events())
