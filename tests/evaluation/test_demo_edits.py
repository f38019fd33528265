# SPDX-License-Identifier: Apache-2.0
"""Scene `edit`: its table compares tokens and times with prefix caching, edit by edit."""

import io
import json
from pathlib import Path

import pytest
from bench_tasks import call_record
from rich.console import Console

from kvcomm_vllm.evaluation.bench.records import CallRecord, Stand
from kvcomm_vllm.evaluation.demo.edits import (
    all_edits,
    at_once,
    edit_rows,
    headline,
    render_table,
)
from kvcomm_vllm.evaluation.demo.table import Heard, write_json


def heard(
    session: str,
    edit: str,
    plain: tuple[int, float],
    ours: tuple[int | None, float],
    ids: list[int],
) -> Heard:
    """One edit of a prompt of 1,000 tokens: tokens computed and time, as plain vLLM and kvcomm."""

    def record(column: str, ttft_ms: float, answer_ids: list[int], cached: int) -> CallRecord:
        return call_record(
            Stand("edit", "lockstep", session),
            column,
            0,
            agent=edit,
            ttft_ms=ttft_ms,
            answer_ids=answer_ids,
            prompt_tokens=1000,
            cached_tokens=cached,
            computed=ours[0] if column == "kvcomm" else plain[0],
        )

    records = {
        "plain": record("plain", plain[1], [1, 2, 3], 1000 - plain[0]),
        "kvcomm": record("kvcomm", ours[1], ids, 0),
    }
    return Heard(session, [], records, {"plain": "dense", "kvcomm": "text"})


CALLS = [
    heard("s1", "first prompt", (1000, 900.0), (1000, 900.0), [1, 2, 3]),
    heard("s1", "clock 1", (960, 800.0), (30, 40.0), [1, 2, 9]),
    heard("s1", "tool removed 1", (800, 700.0), (50, 70.0), [7, 2, 3]),
    heard("s2", "first prompt", (1000, 1100.0), (1000, 1100.0), [1]),
    heard("s2", "clock 1", (960, 1000.0), (50, 60.0), [1]),
    heard("s2", "tool removed 1", (600, 500.0), (70, 90.0), [1]),
]


def test_rows_are_medians_over_sessions_in_the_order_of_the_edits() -> None:
    first, clock, tool = edit_rows(CALLS)
    assert [row.edit for row in (first, clock, tool)] == [
        "first prompt",
        "clock 1",
        "tool removed 1",
    ]
    assert (clock.computed_plain, clock.computed_kvcomm) == (960, 40)
    assert (clock.ttft_cached_ms, clock.ttft_kvcomm_ms) == (900, 50)
    assert clock.speedup_cached == 18
    assert (clock.same_first, tool.same_first) == (1.0, 0.5)
    assert first.speedup_cached == 1


def test_the_sum_counts_edits_and_not_the_first_prompt() -> None:
    total = all_edits(edit_rows(CALLS))
    assert total.edit == "all 2 edits"
    assert total.prompt_tokens == 2000
    assert (total.computed_plain, total.computed_kvcomm) == (960 + 700, 40 + 60)
    assert total.speedup_cached == pytest.approx((900 + 600) / (50 + 80))
    assert total.same_first == 0.75


def test_uncounted_tokens_are_not_reported_as_zero() -> None:
    calls = [*CALLS[:5], heard("s2", "tool removed 1", (600, 500.0), (None, 90.0), [1])]
    rows = edit_rows(calls)
    assert rows[2].computed_kvcomm is None
    assert all_edits(rows).computed_kvcomm is None
    assert "computed" not in headline(rows)
    assert "computed" not in at_once(calls[-1])
    assert printed(calls).count(" - ") == 2


def printed(calls: list[Heard]) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(render_table(edit_rows(calls), 2, 8))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_ends_in_the_sum_and_fits_80_columns() -> None:
    long = [heard("s", "oldest turn dropped 8", (16_000, 99_999.0), (16_000, 99_999.0), [1])] * 8
    text = printed([*CALLS, *long])
    assert "\u2026" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "all 2 edits" in printed(CALLS).rstrip().splitlines()[-1]


def test_an_edit_is_shown_as_soon_as_it_is_answered() -> None:
    line = at_once(CALLS[1])
    for part in ("clock 1", "1,000 tokens", "30 computed", "40 ms", "800 with prefix caching"):
        assert part in line


def test_the_headline_sums_waiting_and_names_the_median_share_computed() -> None:
    text = headline(edit_rows(CALLS))
    assert "0.1 s instead of 1.5 s with prefix caching (11.5x sooner)" in text
    assert "5.0% of the prompt was computed instead of 83%" in text


def test_json_has_the_edits_and_no_column_that_was_not_asked(tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    write_json(file, {"scene": "edit"}, {"edits": edit_rows(CALLS)}, CALLS, [])
    report = json.loads(file.read_text())
    assert [row["edit"] for row in report["edits"]] == ["first prompt", "clock 1", "tool removed 1"]
    assert report["calls"][1]["ttft_ms"] == {"prefix_cache": 800, "kvcomm": 40}
    assert report["calls"][1]["agreement"] == pytest.approx(2 / 3)
    assert "plain_agreement" not in report["calls"][1]
