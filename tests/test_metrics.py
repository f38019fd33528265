# SPDX-License-Identifier: Apache-2.0
"""Counters add up, whoever reports them and however often, and appear under their names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvcomm_vllm.messages import Divergence
from kvcomm_vllm.metrics import HISTOGRAMS, MAX_AGENTS, METRICS, KVCommPromMetrics, KVCommStats
from kvcomm_vllm.reasons import Reason

counts = st.dictionaries(
    st.sampled_from([f"{metric}/{label}" for metric in METRICS for label in ("a", "b/c")]),
    st.integers(1, 10**6),
    max_size=6,
)


def request(**changes: Any) -> Any:
    """What is read of a finished request's state: 10 tokens local, 30 reused, 24 computed."""
    state: dict[str, Any] = {
        "counts": lambda: {"local": 10, "reused": 30, "computed": 24},
        "parts": lambda: {"corrected": 0, "from_approximate": 0},
        "declined": {},
        "outcome": "reused",
    }
    return SimpleNamespace(**{**state, **changes})


@given(st.lists(counts, max_size=5))
def test_what_several_reporters_count_adds_up(parts: list[dict[str, int]]) -> None:
    total = KVCommStats()
    for part in parts:
        total = total.aggregate(KVCommStats(data=dict(part)))
    keys = {key for part in parts for key in part}
    assert total.data == {key: sum(part.get(key, 0) for part in parts) for key in keys}


@given(counts, counts)
def test_adding_up_changes_neither_part(a: dict[str, int], b: dict[str, int]) -> None:
    first, second = KVCommStats(data=dict(a)), KVCommStats(data=dict(b))
    assert first.aggregate(second).data == second.aggregate(first).data
    assert (first.data, second.data) == (a, b)


def test_counts_are_taken_once() -> None:
    stats = KVCommStats()
    stats.count_reason(Reason.BAD_HINTS)
    stats.count_reason(Reason.BAD_HINTS)
    taken = stats.take()
    assert taken is not None
    assert taken.data == {"reasons/bad_hints": 2}
    assert stats.is_empty()
    assert stats.take() is None
    stats.add_seconds("load", 0.5)
    assert taken.data == {"reasons/bad_hints": 2}, "what was taken is another object"


def test_counts_survive_the_way_to_the_api_server() -> None:
    stats = KVCommStats()
    stats.count_request(request(declined={"no_match": 1}))
    stats.add_seconds("planning", 0.25)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(stats.to_dict())) == stats.data


def test_a_finished_request_counts_its_tokens_once_each() -> None:
    stats = KVCommStats()
    stats.count_request(request())
    assert stats.data == {
        "tokens/local": 10,
        "tokens/computed": 24,
        "tokens/reused": 30,
        "requests/reused": 1,
    }


def test_what_is_corrected_or_from_approximate_kv_is_counted_beside_what_is_reused() -> None:
    stats = KVCommStats()
    parts = {"corrected": 20, "from_approximate": 12}
    stats.count_request(request(parts=lambda: parts))
    assert stats.data["tokens/reused"] == 30
    assert stats.data["tokens/corrected"] == 20
    assert stats.data["tokens/from_approximate"] == 12


def test_the_prompt_of_a_request_that_never_ran_is_not_counted_as_computed() -> None:
    stats = KVCommStats()
    stats.count_request(request(outcome="aborted"))
    assert stats.data == {"requests/aborted": 1}


def test_a_declined_request_counts_why() -> None:
    stats = KVCommStats()
    stats.count_request(request(declined={Reason.TOO_LITTLE.value: 1}, outcome="declined"))
    assert stats.data["requests/declined"] == 1
    assert stats.data["reasons/too_little"] == 1


def test_time_comes_with_how_often_it_was_spent() -> None:
    stats = KVCommStats()
    for _ in range(3):
        stats.add_seconds("side_forward", 0.5)
    assert stats.data == {"seconds/side_forward": 1.5, "runs/side_forward": 3}


def test_what_is_held_is_what_was_gained_less_what_was_lost() -> None:
    stats = KVCommStats()
    for placeholders, anchors in [(1, 1), (1, 2), (3, 7), (2, 4), (2, 4)]:
        stats.count_held(placeholders, anchors)
    assert stats.data == {
        "placeholders/gained": 3,
        "placeholders/lost": 1,
        "anchors/gained": 7,
        "anchors/lost": 3,
    }
    stats.take()
    stats.count_held(0, 0)
    assert stats.data == {"placeholders/lost": 2, "anchors/lost": 4}, "kept over what is taken"


def test_the_log_line_speaks_of_tokens_and_milliseconds() -> None:
    stats = KVCommStats()
    stats.count_request(request())
    stats.add_seconds("load", 0.0123)
    assert stats.reduce() == {
        "kvcomm computed tokens": 24,
        "kvcomm local tokens": 10,
        "kvcomm reused tokens": 30,
        "kvcomm load ms": 12.3,
    }


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def exported(registry: CollectorRegistry) -> KVCommPromMetrics:
    """Two engines of one server."""

    def counter(**given: Any) -> Counter:
        return Counter(registry=registry, **given)

    def histogram(**given: Any) -> Histogram:
        return Histogram(registry=registry, **given)

    return KVCommPromMetrics(
        SimpleNamespace(kv_transfer_config=None),
        {Gauge: Gauge, Counter: counter, Histogram: histogram},
        ["model_name", "engine"],
        {0: ["m", "0"], 1: ["m", "1"]},
    )


def test_counters_grow_under_their_names_engine_by_engine(
    registry: CollectorRegistry, exported: KVCommPromMetrics
) -> None:
    exported.observe({"tokens/reused": 30, "seconds/load": 0.5}, engine_idx=0)
    exported.observe({"tokens/reused": 12}, engine_idx=0)
    exported.observe({"tokens/reused": 5}, engine_idx=1)

    def value(name: str, engine: str, **label: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "m", "engine": engine, **label})

    assert value("vllm:kvcomm_tokens_total", "0", treatment="reused") == 42
    assert value("vllm:kvcomm_tokens_total", "1", treatment="reused") == 5
    assert value("vllm:kvcomm_seconds_total", "0", phase="load") == 0.5
    assert value("vllm:kvcomm_seconds_total", "1", phase="load") is None


def test_everything_that_is_counted_is_exported(exported: KVCommPromMetrics) -> None:
    stats = KVCommStats()
    stats.count_request(request(declined={"no_match": 1}))
    stats.add_seconds("planning", 0.1)
    stats.count_lesson("learned")
    stats.count_taught(approximate=True)
    stats.count_held(1, 2)
    stats.count_asked_again("in_flight")
    stats.count_healed(3, 4)
    stats.count_audit("planner", Divergence(0.5, True))
    stats.count_fidelity("normal", "computed")
    stats.count_tier_pages("stored", 3)
    stats.count_transfer(True, 1 << 20, 0.1)
    stats.count_trace(1, 1)
    for metric in METRICS:
        if metric.startswith("tier_") and metric not in ("tier_pages", "tier_bytes"):
            stats.count_tier(metric, "disk", 1)
    assert {key.split("/")[0] for key in stats.data} == {*METRICS, *HISTOGRAMS}
    exported.observe(stats.data)  # would raise for one that has no counter


def test_audits_are_counted_by_agent_and_their_kl_lies_in_buckets(
    registry: CollectorRegistry, exported: KVCommPromMetrics
) -> None:
    stats = KVCommStats()
    for kl, same in ((0.0005, True), (0.04, False)):
        stats.count_audit("planner", Divergence(kl, same))
    stats.count_audit(None, Divergence(0.0, True))
    taken = stats.take()
    assert taken is not None
    again = KVCommStats(data={"audit_kl/planner": [2.0], "audit_requests/planner": 1})
    exported.observe(msgspec.msgpack.decode(msgspec.msgpack.encode(taken.aggregate(again).data)))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "m", "engine": "0", **labels})

    assert value("vllm:kvcomm_audit_requests_total", agent="planner") == 3
    assert value("vllm:kvcomm_audit_same_top_total", agent="planner") == 1
    assert value("vllm:kvcomm_audit_requests_total", agent="") == 1
    assert value("vllm:kvcomm_audit_kl_sum", agent="planner") == pytest.approx(2.0405)
    assert value("vllm:kvcomm_audit_kl_bucket", agent="planner", le="0.001") == 1
    assert value("vllm:kvcomm_audit_kl_bucket", agent="planner", le="0.05") == 2
    assert taken.data["audit_kl/planner"] == [0.0005, 0.04], "adding up changes no part"


def test_names_that_clients_make_up_do_not_make_more_and_more_series() -> None:
    stats = KVCommStats()
    for number in range(3 * MAX_AGENTS):
        stats.count_audit(f"agent {number}", Divergence(0.1, True))
        if number % 5 == 0:
            stats.take()
    stats.take()
    for number in range(3 * MAX_AGENTS):
        stats.count_audit(f"agent {number}", Divergence(0.1, True))
    labels = [key for key in stats.data if key.startswith("audit_requests/")]
    assert len(labels) == MAX_AGENTS + 1
    assert stats.data["audit_requests/other"] == 2 * MAX_AGENTS
