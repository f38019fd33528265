# SPDX-License-Identifier: Apache-2.0
"""What the counters of a server with the plugin say about one request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("openai", reason="the bench extra is not installed")

from bench_endpoint import FakeServer, serving

from kvcomm_vllm.evaluation.serving import counters
from kvcomm_vllm.evaluation.serving.counters import KVCommMeter, lessons_waiting
from kvcomm_vllm.evaluation.serving.metrics_page import totals


def page(
    tokens: dict[str, int],
    reasons: dict[str, int] | None = None,
    lessons: dict[str, int] | None = None,
) -> str:
    counters = {
        "tokens": ("treatment", tokens),
        "reasons": ("reason", reasons or {}),
        "lessons": ("outcome", lessons or {}),
    }
    return "".join(
        f'vllm:kvcomm_{name}_total{{engine="0",{label}="{value}"}} {count}.0\n'
        for name, (label, counts) in counters.items()
        for value, count in counts.items()
    )


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


def test_a_request_is_charged_with_what_was_counted_since_the_one_before(fake: FakeServer) -> None:
    fake.metrics = page({"local": 5, "reused": 5, "computed": 5}, {"no_match": 2})
    meter = KVCommMeter(fake.url)
    fake.metrics = page(
        {"local": 6, "reused": 35, "computed": 14, "corrected": 25},
        {"no_match": 2, "too_little": 1},
    )
    assert meter.take(40) == {
        "local": 1,
        "reused": 30,
        "computed": 9,
        "corrected": 25,
        "declined": {"too_little": 1},
    }
    assert meter.take(0)["declined"] == {}


def test_a_server_without_the_counters_adds_no_field(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "SETTLE_SECONDS", 0.0)
    fake.metrics = "vllm:prompt_tokens_total 3.0\n"
    meter = KVCommMeter(fake.url)
    assert meter.take(3) == {}
    assert meter.settle()


def test_a_lesson_waits_until_it_is_learned_dropped_or_failed() -> None:
    counts = {"queued": 9, "learned": 3, "healed": 1, "dropped": 2, "failed": 1}
    assert lessons_waiting(page({}, lessons=counts)) == 2
    assert lessons_waiting(page({}, lessons={"queued": 9, "learned": 9})) == 0
    assert lessons_waiting("") == 0


def test_lessons_that_wait_are_waited_for_up_to_a_limit(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [{"queued": 2}, {"queued": 2, "learned": 1}, {"queued": 2, "learned": 2}]
    meter = KVCommMeter(fake.url)
    visits = iter(pages)
    monkeypatch.setattr(counters, "read_page", lambda url: page({}, lessons=next(visits)))
    assert meter.settle()
    assert next(visits, None) is None, "all pages were looked at"
    monkeypatch.undo()
    fake.metrics = page({}, lessons={"queued": 1})
    assert not meter.settle(limit=0.0)


def test_sums_are_over_all_other_labels_and_of_one_metric_alone() -> None:
    text = page({"local": 1}) + page({"local": 10}).replace('engine="0"', 'engine="1"')
    text += "vllm:kvcomm_tokens_total_more 5.0\n"
    assert totals(text, "vllm:kvcomm_tokens_total", "treatment") == {"local": 11.0}
    assert totals("vllm:kv_cache_usage_perc 0.25\n", "vllm:kv_cache_usage_perc") == {"": 0.25}
    assert totals(text, "vllm:other") == {}
