# SPDX-License-Identifier: Apache-2.0
"""Who has the same adapter shares; who has another one, or none, never does. An adapter whose
weights were replaced is another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from checks import cached_pages, check_idle, check_report
from engine_without_worker import EngineWithoutWorker
from hypothesis import given
from hypothesis import strategies as st
from scripts import words
from test_learning import AGENT, ANCHOR
from vllm.lora.request import LoRARequest

from kvcomm_vllm.messages import Adapter
from kvcomm_vllm.scheduler.state import namespace_of

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
ONE, OTHER = LoRARequest("one", 1, "/adapters/one"), LoRARequest("other", 2, "/adapters/other")
KINDS = [None, ONE, OTHER]
PIPELINES = pytest.mark.parametrize("pipeline", [1, 2])


@pytest.fixture
def engine(make_engine: Make) -> EngineWithoutWorker:
    return make_engine(loras=2, num_blocks=256)


def prompt(seed: object, text: list[int] = QUESTION) -> list[int]:
    return [*words(seed, 20), *text, *words((seed, "tail"), 7)]


# ---- namespaces ----------------------------------------------------------------------------------

salts = st.one_of(st.none(), st.text(max_size=4))
names = st.tuples(st.text(max_size=3), st.text(min_size=1, max_size=3))
whose = st.tuples(
    salts, st.one_of(st.none(), st.tuples(st.builds(Adapter, st.integers(1, 3)), names))
)


def key(salt: str | None, adapter: tuple[Adapter, tuple[str, str]] | None) -> bytes:
    request: Any = SimpleNamespace(cache_salt=salt, lora_request=None)
    if adapter is None:
        return namespace_of(request, b"secret")
    number, (name, path) = adapter[0], adapter[1]
    request.lora_request = LoRARequest(name, number.number, path)
    return namespace_of(request, b"secret", number)


@given(one=whose, other=whose)
def test_two_share_a_namespace_only_with_the_same_salt_and_the_same_adapter(
    one: Any, other: Any
) -> None:
    assert (key(*one) == key(*other)) == (one == other)


def test_no_salt_looks_like_an_adapter() -> None:
    adapter = Adapter(1)
    looks = repr((None, (1, 0, ("one", "/adapters/one"))))
    assert key(None, (adapter, ("one", "/adapters/one"))) != key(looks, None)


def test_every_version_of_an_adapter_has_a_namespace_of_its_own() -> None:
    keys = {key(None, (Adapter(1, version), ("one", "path"))) for version in range(5)}
    assert len(keys) == 5


def test_without_adapter_a_namespace_is_what_it_was_before_there_were_any() -> None:
    """Manifests on disk are found again."""
    request: Any = SimpleNamespace(cache_salt="salt")
    assert namespace_of(request, b"secret") == key("salt", None)


# ---- sharing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", KINDS, ids=str)
def test_requests_of_one_kind_reuse_among_themselves(
    engine: EngineWithoutWorker, adapter: LoRARequest | None
) -> None:
    engine.serve("first", prompt("a"), adapter=adapter)
    second = engine.serve("second", prompt("b"), adapter=adapter)
    assert second.report["reused"] == 38
    check_report(engine, "second")
    check_idle(engine)


@PIPELINES
@pytest.mark.parametrize("mode", ["rotate", "seam", "anchor"])
def test_the_same_text_of_all_kinds_is_shared_within_each(
    make_engine: Make, pipeline: int, mode: str
) -> None:
    """Side by side and one after another; the simulated pages know whose KV they hold."""
    engine = make_engine(loras=2, num_blocks=256, pipeline=pipeline, mode=mode)
    for number, adapter in enumerate(KINDS):
        served = engine.serve(f"first {number}", prompt("a"), adapter=adapter)
        assert served.loaded == []
        assert (served.report["local"], served.declined) == (0, ["no_match"])
    for number, adapter in enumerate(KINDS):
        engine.add(f"second {number}", prompt("b"), adapter=adapter)
    engine.run()
    for number, adapter in enumerate(KINDS):
        served = engine.served[f"second {number}"]
        assert served.report["reused"] > 30
        assert {ops.adapter for ops in served.loaded} == {adapter and Adapter(adapter.lora_int_id)}
    engine.idle()
    check_idle(engine)


def test_two_adapters_of_one_number_share_nothing(engine: EngineWithoutWorker) -> None:
    """As after a restart of the front end, which counts from one again."""
    engine.serve("first", prompt("a"), adapter=ONE)
    for number, other in enumerate(
        [LoRARequest("one", 1, "/elsewhere"), LoRARequest("two", 1, ONE.lora_path)]
    ):
        served = engine.serve(f"second {number}", prompt("b"), adapter=other)
        assert served.loaded == []
        assert served.declined == ["no_match"]


def test_an_adapter_that_is_loaded_anew_under_another_number_begins_anew(
    engine: EngineWithoutWorker,
) -> None:
    """So it is when it was unloaded over HTTP, whatever lies in its folder by then."""
    engine.serve("first", prompt("a"), adapter=ONE)
    again = LoRARequest(ONE.lora_name, 7, ONE.lora_path)
    served = engine.serve("second", prompt("b"), adapter=again)
    assert served.declined == ["no_match"]
    begins_alike = engine.serve("third", prompt("a"), adapter=again)
    assert begins_alike.report["local"] == 0, "vLLM goes by name and path"
    served = engine.serve("fourth", prompt("c"), adapter=again)
    assert served.report["reused"] == 38
    engine.serve("late", prompt("d"), adapter=ONE)
    assert engine.serve("fifth", prompt("e"), adapter=again).report["reused"] == 38


def test_a_conversation_goes_on_with_its_own_adapter_alone(engine: EngineWithoutWorker) -> None:
    engine.serve("source", prompt("a"), adapter=ONE)
    text, answer = prompt("b"), words("answer", 13)
    engine.serve("answers", text, answer, adapter=ONE)
    turn = [*text, *answer, *words("next", 9)]
    for adapter in (None, OTHER):
        served = engine.serve(f"turn {adapter}", turn, adapter=adapter)
        assert (served.report["local"], served.report["reused"]) == (0, 0)
    own = engine.serve("turn", turn, adapter=ONE)
    assert own.report["local_approximate"] > 0


# ---- what is learned -----------------------------------------------------------------------------


def hear(
    engine: EngineWithoutWorker, number: object, adapter: LoRARequest | None, **options: Any
) -> Any:
    question = words(("question", number), 40)
    engine.serve(f"first {number}", [*words("one", 20), *question, 5], adapter=adapter, **options)
    second = [*AGENT, *question, 7, 8]
    return engine.serve(f"second {number}", second, adapter=adapter, **options)


def test_what_one_adapter_has_taught_corrects_no_other_s(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR, loras=2, num_blocks=256)
    for number in range(3):
        hear(engine, number, ONE)
        engine.idle()
    assert hear(engine, "own", ONE).report["corrected"] > 0
    for adapter in (None, OTHER):
        assert hear(engine, f"of {adapter}", adapter).report["corrected"] == 0
    assert Adapter(1) in [op.adapter for op in engine.lessons]


def test_audits_limit_the_adapter_they_were_about(make_engine: Make) -> None:
    engine = make_engine(loras=2, num_blocks=256, mode="rotate", fidelity_budget=0.001, heal="off")
    for number in itertools.count():
        if hear(engine, number, ONE).declined == ["fidelity"]:
            break
        engine.idle()
        assert number < 40, "audits found it too far from exact"
    assert hear(engine, "of other", OTHER).report["reused"] > 0
    assert hear(engine, "of none", None).report["reused"] > 0


def test_healed_pages_are_found_with_the_same_adapter_alone(make_engine: Make) -> None:
    engine = make_engine(loras=2, num_blocks=256)
    engine.serve("source", prompt("a"), adapter=ONE)
    text, answer = prompt("b"), words("answer", 13)
    engine.serve("answers", text, answer, adapter=ONE)
    engine.idle()
    turn = [*text, *answer, *words("next", 9)]
    for adapter in (None, OTHER):
        assert engine.serve(f"turn {adapter}", turn, adapter=adapter).report["local"] == 0
    own = engine.serve("turn", turn, adapter=ONE)
    assert own.report["local"] > len(text)
    assert own.report["local_approximate"] == 0


def test_a_lesson_whose_adapter_is_gone_is_dropped_and_unlearns_nothing(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR, loras=2, num_blocks=256)
    for number in range(3):
        hear(engine, number, ONE)
        engine.idle()
    before = engine.half.modes.counts()
    hear(engine, "gone", ONE)
    engine.gone = {1}
    engine.idle()
    assert not engine.half.lessons.pending
    assert engine.half.modes.counts() == before
    engine.gone = set()
    assert hear(engine, "again", ONE).report["corrected"] > 0
    engine.idle()
    assert engine.half.modes.counts() > before


def test_mode_paper_keeps_anchors_of_adapters_apart(make_engine: Make) -> None:
    paper = {"mode": "paper", "paper": {"memory_mb": 1}, "min_span_tokens": 12}
    engine = make_engine(**paper, loras=2, num_blocks=256)
    for number in range(4):
        hear(engine, number, ONE)
        engine.idle()
    own = hear(engine, "own", ONE)
    assert own.loaded
    assert own.loaded[-1].adapter == Adapter(1)
    for adapter in (None, OTHER):
        assert hear(engine, f"of {adapter}", adapter).loaded == []


# ---- weights that are replaced -------------------------------------------------------------------


@PIPELINES
def test_a_replaced_adapter_is_met_by_nobody(make_engine: Make, pipeline: int) -> None:
    engine = make_engine(loras=2, num_blocks=256, pipeline=pipeline, heal="off", audits=False)
    for adapter in KINDS:
        engine.serve(f"first {adapter}", prompt("a"), adapter=adapter)
    engine.memory.versions[1] += 1
    surprised = engine.serve("second", prompt("b"), adapter=ONE)
    assert surprised.loaded == [], "planned before anybody knew"
    assert surprised.declined == ["load_repaired"]
    third = engine.serve("third", prompt("c"), adapter=ONE)
    assert third.declined == ["no_match"], "what the second has is not taken for the old one's"
    fourth = engine.serve("fourth", prompt("d"), adapter=ONE)
    assert fourth.report["reused"] == 38
    assert fourth.loaded[-1].adapter == Adapter(1, 1)
    for adapter in (None, OTHER):
        assert engine.serve(f"b {adapter}", prompt("b"), adapter=adapter).report["reused"] == 38
    check_idle(engine)


def test_its_pages_are_taken_out_of_vllm_s_own_cache(engine: EngineWithoutWorker) -> None:
    """vLLM would go on serving them to whoever begins with the same text."""
    engine.serve("first", prompt("a"), adapter=ONE)
    engine.serve("other", prompt("a"), adapter=OTHER)
    engine.memory.versions[1] += 1
    engine.serve("second", words("b", 30), adapter=ONE)
    assert engine.serve("third", prompt("a"), adapter=ONE).report["local"] == 0
    assert engine.serve("fourth", prompt("a"), adapter=OTHER).report["local"] > 0


def test_a_request_of_one_token_is_not_stored_as_the_old_version_s(
    engine: EngineWithoutWorker,
) -> None:
    """It ends in the very step that finds the new weights."""
    engine.serve("first", words("x", 30), adapter=ONE)
    engine.memory.versions[1] += 1
    engine.serve("second", prompt("a"), [1], adapter=ONE)
    owners = {sequence.owner for sequence in engine.half.store.index._row_of}
    assert owners == set()
    third = engine.serve("third", prompt("b"), adapter=ONE)
    assert third.declined == ["no_match"]


def test_who_waits_while_it_is_replaced_is_served_exactly(make_engine: Make) -> None:
    engine = make_engine(loras=1, num_blocks=256, max_num_seqs=1)
    engine.serve("first", prompt("a"), adapter=ONE)
    engine.memory.versions[1] += 1
    engine.add("runs", words("x", 30), adapter=ONE)
    engine.add("waits", prompt("b"), adapter=ONE)
    engine.run()
    assert engine.served["waits"].loaded == []
    assert engine.served["waits"].declined == ["adapter_replaced"]


def test_lessons_about_old_weights_are_not_taught(make_engine: Make) -> None:
    engine = make_engine(**ANCHOR, loras=2, num_blocks=256)
    for number in range(3):
        hear(engine, number, ONE)
        engine.idle()
    hear(engine, "untaught", ONE)
    engine.memory.versions[1] += 1
    engine.idle()
    after = hear(engine, "new", ONE)
    assert after.report.get("corrected", 0) == 0
    for number in range(10, 14):
        hear(engine, number, ONE)
        engine.idle()
    assert hear(engine, "warm again", ONE).report["corrected"] > 0


def test_news_that_are_told_twice_are_heard_once(engine: EngineWithoutWorker) -> None:
    engine.half.adapters.hear({1: 3})
    engine.serve("first", prompt("a"), adapter=ONE)
    engine.half.adapters.hear({1: 3})
    owners = {sequence.owner for sequence in engine.half.store.index._row_of}
    assert owners == {"first"}


# ---- where adapters are served otherwise ---------------------------------------------------------


def test_holes_of_more_than_a_step_are_not_spread(make_engine: Make) -> None:
    """While it waited for pieces, its adapter might be in no slot."""
    engine = make_engine(loras=1, num_blocks=256, budget=32)
    engine.serve("first", prompt("a"), adapter=ONE)
    engine.serve("second", [*words("b", 24), *words("other", 30)], adapter=ONE)
    text = [*QUESTION, *words("new", 60), *words("other", 30), 3, 4]
    served = engine.serve("third", text, adapter=ONE)
    assert served.declined == ["adapter_holes"]
    engine.serve("first of none", prompt("a"))
    engine.serve("second of none", [*words("b", 24), *words("other", 30)])
    assert engine.serve("third of none", text).report["reused"] > 30


def test_what_one_step_takes_is_computed_at_once_beside_others(make_engine: Make) -> None:
    engine = make_engine(loras=1, num_blocks=256, budget=64)
    engine.serve("first", prompt("a"), adapter=ONE)
    engine.serve("second", [*words("b", 24), *words("other", 30)], adapter=ONE)
    engine.add("beside", words("beside", 20), words("goes on", 30))
    text = [*QUESTION, *words("new", 40), *words("other", 30), 3, 4]
    engine.add("third", text, adapter=ONE)
    engine.run()
    served = engine.served["third"]
    assert served.report["reused"] > 30
    assert all(not ops.waits for ops in served.loaded)


def test_pages_of_adapters_go_to_no_tier(make_engine: Make) -> None:
    engine = make_engine(
        tiers={"host_gb": 0.002}, loras=1, num_blocks=48, audits=False, heal="idle"
    )
    engine.serve("first", prompt("a"), adapter=ONE)
    engine.serve("second", prompt("b"), words("answer", 9), adapter=ONE)
    engine.idle()
    assert cached_pages(engine)
    assert not any(engine.half.tiers.holds(s) for s in engine.half.store.index._row_of)
    assert engine.host_pool.done == []
    for number in range(3):
        engine.serve(f"fill {number}", words(number, 150))
    assert engine.serve("third", prompt("a"), adapter=ONE).report["local"] == 0
