# SPDX-License-Identifier: Apache-2.0
"""What each number of the report counts, on records small enough to count by hand."""

from pathlib import Path
from typing import Any

import pytest
from made_up_run import SETTINGS, Row, call_row, save, task_row

pytest.importorskip("openai", reason="the bench extra is not installed")

from kvcomm_vllm.evaluation.report import times
from kvcomm_vllm.evaluation.report.answers import DIFFERENCE, answers, worse
from kvcomm_vllm.evaluation.report.break_even import break_even
from kvcomm_vllm.evaluation.report.load import load
from kvcomm_vllm.evaluation.report.memory import memory
from kvcomm_vllm.evaluation.report.report import Rows, make_report
from kvcomm_vllm.evaluation.report.reuse import reuse, treatments
from kvcomm_vllm.evaluation.report.run import ALL, Run, read_run
from kvcomm_vllm.evaluation.report.stream import stream
from kvcomm_vllm.evaluation.report.times import VS_PLAIN
from kvcomm_vllm.evaluation.report.words import cards
from kvcomm_vllm.evaluation.workloads.rows import DataError


def values(of: Rows, run: Run, column: str, workload: str = "math") -> list[dict[str, Any]]:
    """The numbers of a table's rows about a column."""
    return [{name: cell.value for name, cell in row.items()} for row in of(run, workload, column)]


def only(of: Rows, run: Run, column: str, workload: str = "math") -> dict[str, Any]:
    (row,) = values(of, run, column, workload)
    return row


def run_of(folder: Path, *rows: Row, settings: dict[str, Any] | None = None) -> Run:
    return read_run(save(folder, list(rows), settings))


def one_call_tasks(column: str, ttft: list[float], **fields: Any) -> list[Row]:
    """A task of a single call for each time to first token."""
    rows = []
    for number, ms in enumerate(ttft):
        common = {"warmup": number == 0, **fields}
        rows.append(call_row(column, f"task {number}", 0, ttft_ms=ms, **common))
        rows.append(task_row(column, f"task {number}", **common))
    return rows


def test_a_task_that_was_begun_twice_counts_once(tmp_path: Path) -> None:
    run = run_of(
        tmp_path,
        call_row("plain", "a", 0, ttft_ms=1.0),  # interrupted before the task's end
        call_row("plain", "a", 0, ttft_ms=2.0, session=1),
        task_row("plain", "a", session=1),
        call_row("plain", "b", 0, session=1),
    )
    assert [call.ttft_ms for call in run.calls] == [2.0]
    assert run.incomplete == 2


def test_every_session_keeps_its_own_warm_up(tmp_path: Path) -> None:
    rows = [
        row
        for session in (0, 1)
        for row in (
            call_row("plain", "w", 0, warmup=True, session=session),
            task_row("plain", "w", warmup=True, session=session),
        )
    ]
    assert len(run_of(tmp_path, *rows).calls) == 2


def test_lines_that_were_cut_off_are_left_out_and_broken_ones_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, [task_row("plain", "a")])
    path = folder / "records.jsonl"
    path.write_text(path.read_text() + '{"kind": "ca')
    assert len(read_run(folder).tasks) == 1
    path.write_text(path.read_text() + '\n{"kind": "task"}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_run(folder)
    path.write_text('{"kind": "task"}\n')
    with pytest.raises(DataError, match="line 1: not a record"):
        read_run(folder)
    with pytest.raises(DataError, match=r"no records\.jsonl"):
        read_run(tmp_path / "elsewhere")


def test_fields_and_kinds_of_later_versions_are_no_error(tmp_path: Path) -> None:
    run = run_of(tmp_path, {**task_row("plain", "a"), "colour": "red"}, {"kind": "weather"})
    assert (len(run.tasks), run.settings) == (1, {})


def test_percentiles_and_sums_hold_all_calls_with_warm_up_also_apart(tmp_path: Path) -> None:
    plain = one_call_tasks("plain", [900.0, 100.0, 200.0], full_hit_ms=10.0)
    run = run_of(tmp_path, *plain, *one_call_tasks("anchor", [600.0, 50.0, 150.0]))
    found = only(times.first_token, run, "anchor")
    assert (found["calls"], found["p50 ms"], found["sum s"]) == (3, 150.0, 0.8)
    assert found[VS_PLAIN].value == 1200 / 800
    assert (found["× full hit [95%]"].value, found["full hit p50 ms"]) == (800 / 30, 10.0)
    apart = {row["which calls"]: row[VS_PLAIN] for row in values(times.apart, run, "anchor")}
    assert apart["warm-up"].value == 900 / 600
    assert apart["after warm-up"].value == 300 / 200


def test_calls_are_compared_with_the_same_call_only(tmp_path: Path) -> None:
    anchor = one_call_tasks("anchor", [600.0, 50.0])
    plain = [call_row("plain", "task 1", 0, ttft_ms=45.0), task_row("plain", "task 1")]
    # the warm-up has no counterpart, the other task is a warm-up on neither side
    run = run_of(tmp_path, *anchor, *plain)
    assert only(times.first_token, run, "anchor")[VS_PLAIN].value == 45 / 50
    assert "100.0% slower calls" in cards(make_report(run))[1], "45 ms is 10% sooner than 50"
    assert values(times.first_token, run, "seam") == []


def test_reusing_calls_and_the_rest_are_told_apart(tmp_path: Path) -> None:
    calls = [call_row("seam", "a", index) for index in range(3)]
    run = run_of(tmp_path, *calls, task_row("seam", "a"))
    apart = {row["which calls"]: row["calls"] for row in values(times.apart, run, "seam")}
    assert (apart["reusing"], apart["not reusing"]) == (2, 1)
    agents = [row["agent"] for row in times.by_agent(run, "math").rows]
    assert agents == ["Reader", "Planner", "Solver"]


def test_without_counts_no_call_is_said_to_reuse_or_not(tmp_path: Path) -> None:
    run = run_of(tmp_path, call_row("plain", "a", 1), task_row("plain", "a"))
    assert [row["which calls"] for row in values(times.apart, run, "plain")] == ["after warm-up"]
    shares, tokens = only(reuse, run, "plain"), only(treatments, run, "plain")
    assert (shares["of quoted"], shares["reusing all"], tokens["reused"]) == (None, None, None)
    assert tokens["local"] == 128, "the server's own count of cached tokens"


def test_shares_of_tokens_are_over_prompt_repeated_and_quoted(tmp_path: Path) -> None:
    counts = {"prompt_tokens": 1000, "repeated_tokens": 900, "local": 100, "reused": 720}
    rows = [call_row("seam", "a", 1, computed=180, **counts), task_row("seam", "a")]
    found = only(reuse, run_of(tmp_path, *rows), "seam")
    shares = [found[name] for name in ("of prompt", "of repeated", "of quoted")]
    assert shares == [0.82, 820 / 900, 720 / 800]


@pytest.mark.parametrize(("reused", "fully"), [(800 - 3 * 7 - 15, 1), (800 - 3 * 7 - 15 - 1, 0)])
def test_a_call_is_fully_reused_but_for_a_seam_per_run_and_part_of_a_page(
    tmp_path: Path, reused: int, fully: int
) -> None:
    settings = {
        "servers": [{"command": ["vllm", "serve", "m", "--block-size", "16"]}],
        "config": {"effective": {"seam_tokens": 7}},
    }
    counts = {"repeated_tokens": 900, "repeated_runs": 3, "local": 100, "reused": reused}
    rows = [call_row("seam", "a", 1, **counts), task_row("seam", "a")]
    found = only(reuse, run_of(tmp_path, *rows, settings=settings), "seam")
    assert (found["quoting calls"], found["reusing some"], found["reusing all"]) == (1, 1, fully)


def test_the_rest_of_a_page_of_the_own_prefix_is_no_quote(tmp_path: Path) -> None:
    counts = {"repeated_tokens": 131, "local": 100, "reused": 0}
    rows = [call_row("seam", "a", 0, **counts), task_row("seam", "a")]
    found = only(reuse, run_of(tmp_path, *rows, settings=SETTINGS), "seam")
    assert found["quoting calls"] == 0


def scored(column: str, scores: list[float], **fields: Any) -> list[Row]:
    return [
        task_row(column, f"task {number}", score=score, **fields)
        for number, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("wrong", "tasks", "worse_than_plain"),
    [(10, 20, True), (1, 20, False), (4, 4, False), (0, 20, False)],
)
def test_only_a_drop_that_is_no_chance_is_called_significant(
    tmp_path: Path, wrong: int, tasks: int, worse_than_plain: bool
) -> None:
    ours = [0.0] * wrong + [1.0] * (tasks - wrong)
    run = run_of(tmp_path, *scored("plain", [1.0] * tasks), *scored("anchor", ours))
    difference = only(answers, run, "anchor")[DIFFERENCE]
    assert difference.value == pytest.approx(-wrong / tasks)
    assert worse(difference) == worse_than_plain


def test_tasks_of_a_group_are_drawn_together(tmp_path: Path) -> None:
    groups = [task_row(c, f"t{n}", group=f"g{n // 2}") for c in ("plain", "seam") for n in range(8)]
    assert only(answers, run_of(tmp_path, *groups), "seam", ALL)[DIFFERENCE].units == 4


def test_answers_are_compared_where_prompts_are_equal_only(tmp_path: Path) -> None:
    rows = [
        call_row("plain", "a", 0, answer_ids=[1, 2, 3, 4]),
        call_row("plain", "a", 1, answer_ids=[1, 2, 3, 4]),
        call_row("plain", "a", 2, answer_ids=[1, 2, 3, 4]),
        call_row("anchor", "a", 0, answer_ids=[1, 2, 3, 4]),
        call_row("anchor", "a", 1, answer_ids=[1, 2, 9, 9]),
        call_row("anchor", "a", 2, answer_ids=[9], prompt_digest="another"),
    ]
    run = run_of(tmp_path, *rows, task_row("plain", "a"), task_row("anchor", "a"))
    found = only(answers, run, "anchor")
    shares = [found[name] for name in ("equal prompts", "equal answers", "equal start")]
    assert shares == [2, 0.5, 0.75]


def test_judges_are_consistent_where_both_orders_end_in_one_choice(tmp_path: Path) -> None:
    choices = {"a": ("X", "X"), "b": ("X", "Y"), "c": (None, None)}
    rows = [
        task_row("seam", f"{group}{order}", group=group, choice=choice, score=None)
        for group, both in choices.items()
        for order, choice in enumerate(both)
    ]
    found = only(answers, run_of(tmp_path, *rows), "seam")
    assert found["consistent"] == pytest.approx(1 / 3)
    assert found["score"] is None


def calls_with_savings(saved: dict[int, float], first: float = 0.0) -> list[Row]:
    """Tasks of one call, by reused tokens and what that saves in ms; the warm-up saves `first`."""
    rows = []
    for number, (reused, gain) in enumerate([(0, first), *saved.items()]):
        common = {"warmup": number == 0}
        for column, ms in (("plain", 1000.0), ("seam", 1000.0 - gain)):
            task, kind = f"task {number}", {"reused": reused if column == "seam" else None}
            rows.append(call_row(column, task, 1, ttft_ms=ms, **kind, **common))
            rows.append(task_row(column, task, **common))
    return rows


def test_break_even_is_where_the_line_of_savings_crosses_zero(tmp_path: Path) -> None:
    saved = {tokens: -30 + 0.5 * tokens for tokens in (0, 50, 100, 300, 700, 900)}
    found = only(break_even, run_of(tmp_path, *calls_with_savings(saved, -100)), "seam")
    assert found["ms saved with 0 reused"] == pytest.approx(-30)
    assert found["ms saved per 1,000 reused"] == pytest.approx(500)
    assert found["pays from, tokens [95%]"].value == pytest.approx(60)
    assert (found["fewest reused"], found["warm-up cost, s"]) == (50, pytest.approx(0.1))
    # -100, -130, -135, -115, +5: ahead for good from the fifth call on
    assert found["ahead from call"] == 5


def test_what_never_pays_has_no_break_even(tmp_path: Path) -> None:
    saved = {tokens: -30 - 0.1 * tokens for tokens in (0, 50, 100, 300, 700)}
    found = only(break_even, run_of(tmp_path, *calls_with_savings(saved)), "seam")
    assert (found["pays from, tokens [95%]"], found["ahead from call"]) == (None, None)


def test_times_are_fitted_to_prompt_length_without_warm_up(tmp_path: Path) -> None:
    lengths = [9999, 100, 200, 400, 800]
    rows = one_call_tasks("plain", [50.0 + 1.5 * length for length in lengths])
    calls = [row for row in rows if row["kind"] == "call"]
    for call, length in zip(calls, lengths, strict=True):
        call["prompt_tokens"] = length
    calls[0]["ttft_ms"] = 1.0
    found = only(break_even, run_of(tmp_path, *rows), "plain")
    assert found["ms per 1,000 prompt tokens"] == pytest.approx(1500)
    assert (found["ms saved with 0 reused"], found["ahead from call"]) == (None, None)


def streamed(savings: list[float]) -> list[Row]:
    plain = one_call_tasks("plain", [1000.0] * (len(savings) + 1), phase="stream")
    ours = [5000.0, *(1000 * (1 - saving) for saving in savings)]
    return [*plain, *one_call_tasks("anchor", ours, phase="stream")]


def test_a_saving_that_decays_over_a_stream_shows(tmp_path: Path) -> None:
    run = run_of(tmp_path, *streamed([0.8] * 100 + [0.6] * 100 + [0.4] * 100))
    found = values(stream, run, "anchor", ALL)
    assert [row["tasks"] for row in found] == [[1, 100], [101, 200], [201, 300]]
    assert [row["saved"] for row in found] == pytest.approx([0.8, 0.6, 0.4])
    assert [row["typical"] for row in found] == pytest.approx([0.8, 0.6, 0.4])
    assert found[-1]["last / first [95%]"].value == pytest.approx(0.5)


def test_a_late_call_moves_the_saving_but_not_the_typical_one(tmp_path: Path) -> None:
    run = run_of(tmp_path, *streamed([0.5] * 199 + [-99.0]))
    _, late = values(stream, run, "anchor", ALL)
    assert late["saved"] < 0
    assert late["typical"] == 0.5


def test_a_short_stream_is_cut_into_thirds(tmp_path: Path) -> None:
    found = values(stream, run_of(tmp_path, *streamed([0.5] * 20)), "anchor", ALL)
    assert [row["tasks"] for row in found] == [[1, 6], [7, 12], [13, 20]]
    assert values(stream, run_of(tmp_path, *streamed([])), "anchor", ALL) == []


def test_throughput_is_from_the_first_arrival_to_the_last_end(tmp_path: Path) -> None:
    rows = []
    for number, (arrival, seconds) in enumerate([(10.0, 5.0), (12.0, 8.0), (16.0, 2.0)]):
        common = {"phase": "load", "at_s": arrival}
        rows.append(call_row("seam", f"t{number}", 0, output_tokens=20, **common))
        rows.append(task_row("seam", f"t{number}", seconds=seconds, **common))
    found = only(load, run_of(tmp_path, *rows), "seam")
    assert (found["ended /s"], found["output tokens /s"]) == (0.3, 6.0)
    assert found["arriving /s"] == pytest.approx(2 / 6)
    assert found["task p50 s"] == 5.0


def test_memory_growth_leaves_out_warm_up_and_earlier_sessions(tmp_path: Path) -> None:
    looks = [(0, False, 900.0), (1, True, 100.0), (1, False, 500.0), (1, False, 520.0)]
    rows: list[Row] = [
        {
            "kind": "memory",
            "workload": "math",
            "phase": "lockstep",
            "column": "plain",
            "task": f"t{number}",
            "kv_usage": 0.1 * number,
            "resident_mb": mb,
            "slots": None,
            "anchors": None,
            "at_s": 60.0,
            "warmup": warmup,
            "session": session,
        }
        for number, (session, warmup, mb) in enumerate(looks)
    ]
    (found,) = memory(run_of(tmp_path, *rows)).rows
    sizes = [found[name].value for name in ("after warm-up MB", "end MB", "most MB")]
    assert sizes == [500.0, 520.0, 900.0]
    assert found["pages in use"].value == pytest.approx(0.3)


def test_columns_of_one_server_are_one_line_of_memory(tmp_path: Path) -> None:
    look = {"kind": "memory", "workload": "math", "phase": "lockstep", "task": "t"}
    look |= {"kv_usage": 0.5, "slots": None, "anchors": None}
    rows = [
        {**look, "column": column, "resident_mb": mb}
        for column, mb in (("plain", 10.0), ("anchor", 20.0), ("seam", 30.0))
    ]
    found = memory(run_of(tmp_path, *rows, settings=SETTINGS)).rows
    assert [(row["server"], row["most MB"].value) for row in found] == [
        ("plain", 10),
        ("kvcomm", 30),
    ]
