# SPDX-License-Identifier: Apache-2.0
"""Pages that have left the KV cache come back from the host pool, under their own names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words
from vllm.v1.core.sched.interface import PauseState

Make = Callable[..., EngineWithoutWorker]
POOL = {"host_gb": 0.002}  # 512 pages: each takes 4 KiB at least
SHARED = words("shared", 48)


@pytest.fixture
def engine(make_engine: Make) -> EngineWithoutWorker:
    return make_engine(tiers=POOL, audits=False, heal="off", num_blocks=48)


def fill(engine: EngineWithoutWorker, seed: object) -> None:
    """Other work takes all pages."""
    for number in range(3):
        engine.serve(f"{seed} {number}", words((seed, number), 150))
    engine.idle()


def test_text_that_has_left_the_cache_is_reused(engine: EngineWithoutWorker) -> None:
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    fill(engine, "other")
    served = engine.serve("b", words("c", 24) + SHARED + words("d", 3))
    assert served.report["reused"] == 46
    engine.idle()
    check_idle(engine)


def test_an_exact_beginning_comes_back_as_a_local_hit(engine: EngineWithoutWorker) -> None:
    prompt = words("a", 20) + SHARED
    engine.serve("a", prompt)
    fill(engine, "other")
    served = engine.serve("b", prompt + words("d", 9))
    assert served.report["local"] == 68
    assert served.report["computed"] == 9


def test_a_request_that_does_not_reuse_has_its_beginning_back_all_the_same(
    engine: EngineWithoutWorker,
) -> None:
    prompt = words("a", 20) + SHARED
    engine.serve("a", prompt)
    fill(engine, "other")
    served = engine.serve("b", prompt + words("d", 9), hints={"mode": "off"})
    assert served.report["local"] == 68
    assert served.declined == ["mode_off"]


def test_log_probabilities_of_a_prompt_are_computed(engine: EngineWithoutWorker) -> None:
    prompt = words("a", 20) + SHARED
    engine.serve("a", prompt)
    fill(engine, "other")
    served = engine.serve("b", prompt, prompt_logprobs=1)
    assert served.report["computed"] == len(prompt)


def test_a_conversation_that_was_served_approximately_goes_on(engine: EngineWithoutWorker) -> None:
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    prompt = words("c", 24) + SHARED + words("d", 4)
    engine.serve("b", prompt, words("answer", 8))
    fill(engine, "other")
    served = engine.serve("c", [*prompt, *words("answer", 8), *words("e", 5)])
    assert served.report["local"] >= 80
    assert served.report["local_approximate"]


def test_a_request_that_wants_exact_kv_gets_no_private_page(engine: EngineWithoutWorker) -> None:
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    prompt = words("c", 24) + SHARED + words("d", 4)
    engine.serve("b", prompt)
    fill(engine, "other")
    engine.serve("c", prompt + words("e", 5))
    served = engine.serve("d", prompt + words("e", 5), hints={"mode": "off"})
    assert served.report["local"] <= 24


def test_tenants_share_nothing_through_the_pool(engine: EngineWithoutWorker) -> None:
    engine.serve("a", words("a", 20) + SHARED + words("b", 3), salt="one")
    fill(engine, "other")
    served = engine.serve("b", words("a", 20) + SHARED + words("b", 3), salt="two")
    assert (served.report["local"], served.report["reused"]) == (0, 0)


def test_what_is_computed_sooner_is_not_brought_back(engine: EngineWithoutWorker) -> None:
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    fill(engine, "other")
    engine.half.tiers._costs.worth = lambda behind: False
    served = engine.serve("b", words("c", 24) + SHARED + words("d", 3))
    assert (served.report["reused"], served.declined) == (0, ["source_evicted"])


def test_a_copy_that_fails_is_computed(engine: EngineWithoutWorker) -> None:
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    fill(engine, "other")
    engine.host_pool.fail = lambda op: not op.stores
    served = engine.serve("b", words("c", 24) + SHARED + words("d", 3))
    assert served.report["reused"] == 0
    engine.idle()
    check_idle(engine)


def test_pages_that_could_not_be_kept_are_not_found(engine: EngineWithoutWorker) -> None:
    engine.host_pool.fail = lambda op: op.stores
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    fill(engine, "other")
    assert not engine.host_pool.chunks
    served = engine.serve("b", words("c", 24) + SHARED + words("d", 3))
    assert served.report["reused"] == 0


def test_who_hangs_up_while_pages_come_back_leaves_nothing_held(
    engine: EngineWithoutWorker,
) -> None:
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    fill(engine, "other")
    engine.host_pool.most_steps = 5
    engine.add("b", words("c", 24) + SHARED + words("d", 3))
    engine.step()
    engine.abort("b")
    engine.idle()
    check_idle(engine)


def test_a_reset_forgets_what_is_kept_and_what_is_on_its_way(engine: EngineWithoutWorker) -> None:
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    assert engine.half.tiers.due(), "it is being copied"
    engine.half.reset()
    engine.memory.weights_now += 1
    engine.idle()
    fill(engine, "other")
    served = engine.serve("b", words("a", 20) + SHARED + words("b", 3))
    assert (served.report["local"], served.report["reused"]) == (0, 0)
    engine.idle()
    check_idle(engine)


def test_a_paused_engine_holds_no_page(engine: EngineWithoutWorker) -> None:
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    engine.idle()
    engine.add("b", words("c", 90))
    engine.run("b")
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    engine.idle()
    assert engine.scheduler.reset_prefix_cache()


def test_a_full_pool_gives_its_oldest_pages_away(make_engine: Make) -> None:
    engine = make_engine(tiers={"host_gb": 64 * 4096 / 2**30}, audits=False, num_blocks=48)
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    for number in range(4):
        fill(engine, number)
    assert len(engine.host_pool.chunks) == 64
    served = engine.serve("b", words("c", 24) + SHARED + words("d", 3))
    assert served.report["reused"] == 0, "its pages went first"


def test_sequences_stay_findable_while_the_pool_has_their_pages(
    engine: EngineWithoutWorker,
) -> None:
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    for number in range(4):
        fill(engine, number)
    assert any(sequence.owner == "a" for sequence in engine.half.store.index._row_of)


def test_without_a_pool_it_is_computed(make_engine: Make) -> None:
    engine = make_engine(audits=False, heal="off", num_blocks=48)
    engine.serve("a", words("a", 20) + SHARED + words("b", 3))
    fill(engine, "other")
    served = engine.serve("b", words("c", 24) + SHARED + words("d", 3))
    assert served.report["reused"] == 0
