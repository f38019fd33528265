# SPDX-License-Identifier: Apache-2.0
import io
import json
from pathlib import Path
from typing import Any

import pytest
from bench_tasks import call_record
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvcomm_vllm.evaluation.bench.records import CallRecord, Stand
from kvcomm_vllm.evaluation.demo.table import (
    Heard,
    Traced,
    agent_rows,
    at_once,
    headline,
    render_table,
    write_json,
)
from kvcomm_vllm.evaluation.report.numbers import sooner
from kvcomm_vllm.evaluation.workloads.answers import equal_leading_share

IDS = st.lists(st.integers(0, 3), max_size=12).map(tuple)
Counts = tuple[int, int, int]


def record(ttft_ms: float, ids: tuple[int, ...] = (1, 2, 3, 4), **more: Any) -> CallRecord:
    stand = Stand("notes", "lockstep", "q")
    return call_record(stand, "kvcomm", 0, ttft_ms=ttft_ms, answer_ids=list(ids), **more)


def heard(
    question: str,
    agent: str,
    plain: CallRecord,
    cached: CallRecord,
    ttft_ms: float,
    counts: Counts | None,
    prompt_tokens: int = 100,
) -> Heard:
    names = ("local", "reused", "computed")
    more = dict(zip(names, counts, strict=True)) if counts else {}
    ours = record(ttft_ms, agent=agent, prompt_tokens=prompt_tokens, **more)
    records = {"plain_nocache": plain, "plain": cached, "kvcomm": ours}
    return Heard(question, [], records, {"plain": "dense", "kvcomm": "text"})


CALLS = [
    heard("q1", "Reader", record(1000, (1, 2, 9, 9)), record(500, (1, 2, 9, 0)), 100, (10, 0, 90)),
    heard("q1", "Editor", record(2000), record(800), 10, (10, 80, 10)),
    heard("q2", "Reader", record(3000), record(700), 300, (30, 0, 70)),
    heard("q2", "Editor", record(4000), record(1600), 30, (10, 60, 30)),
]


@given(IDS, IDS)
def test_agreement_is_one_for_equal_answers_only(
    first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    share = equal_leading_share(first, second)
    assert 0 <= share <= 1
    assert (share == 1) == (first == second)
    assert share == equal_leading_share(second, first)


@given(IDS, IDS, IDS)
def test_agreement_counts_leading_tokens_and_nothing_after_the_first_difference(
    common: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    one, other = (*common, 7, *first), (*common, 8, *second)
    assert equal_leading_share(one, other) == len(common) / max(len(one), len(other))


def test_rows_are_medians_over_questions_with_ratios_of_medians() -> None:
    reader, editor = agent_rows(CALLS)
    assert (reader.agent, editor.agent) == ("Reader", "Editor")
    assert (reader.local, reader.reused, reader.computed) == (20, 0, 80)
    assert (reader.ttft_plain_ms, reader.ttft_cached_ms, reader.ttft_kvcomm_ms) == (2000, 600, 200)
    assert (reader.speedup_plain, reader.speedup_cached) == (10, 3)
    assert reader.agreement == pytest.approx((0.5 + 1) / 2)
    assert reader.plain_agreement == pytest.approx((0.75 + 1) / 2)
    assert editor.speedup_cached == 60


def test_uncounted_tokens_are_not_reported_as_zero() -> None:
    calls = [*CALLS[:3], heard("q2", "Editor", record(4000), record(1600), 30, None)]
    reader, editor = agent_rows(calls)
    assert reader.reused == 0
    assert editor.reused is None
    assert " - " in printed(calls)


def printed(calls: list[Heard]) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(render_table(agent_rows(calls), 2, 256))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_call_is_shown_as_soon_as_it_is_answered() -> None:
    line = at_once(CALLS[1])
    for part in ("Editor", "80 reused", "10 ms", "800 with", "2,000 without"):
        assert part in line


def test_the_table_fits_a_terminal_of_80_columns_without_cutting_anything() -> None:
    wide = [
        heard(c.question, c.agent, c.plain, c.cached, 99_999.0, (8_192,) * 3, 8_192) for c in CALLS
    ]
    text = printed(wide)
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count("8,192") == 8
    assert text.count("99,999") == 2


def test_the_headline_compares_with_prefix_caching_and_not_with_the_weaker_baseline() -> None:
    text = headline(agent_rows(CALLS))
    assert "0.2 s instead of 1.8 s with prefix caching" in text
    assert "60.0x sooner (20 ms instead of 1,200 ms)" in text


def test_a_loss_is_not_called_a_gain() -> None:
    assert sooner(2.0) == "2.0x sooner"
    assert sooner(0.5) == "2.0x later"
    assert sooner(0.99) == sooner(1.01) == "as soon"


def test_json_holds_the_settings_the_rows_and_every_call(tmp_path: Path) -> None:
    traced = [Traced("Reader", 100, {"spans": [[0, 100, "local"]]})]
    file = tmp_path / "demo.json"
    write_json(file, {"model": "m"}, {"agents": agent_rows(CALLS)}, CALLS, traced)
    report = json.loads(file.read_text())
    assert report["model"] == "m"
    assert [row["agent"] for row in report["agents"]] == ["Reader", "Editor"]
    assert report["calls"][1]["ttft_ms"] == {"plain": 2000, "prefix_cache": 800, "kvcomm": 10}
    treatment = report["calls"][1]["treatment"]
    assert (treatment["local"], treatment["reused"], treatment["computed"]) == (10, 80, 10)
    assert report["trace"][0]["report"]["spans"] == [[0, 100, "local"]]
    assert report["calls"][1]["answer"] == {"plain": "dense", "kvcomm": "text"}
