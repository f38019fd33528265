# SPDX-License-Identifier: Apache-2.0
"""What each number of the report counts, on records small enough to count by hand."""

from pathlib import Path
from typing import Any

import pytest
from made_up_run import SETTINGS, Row, call_row, save, task_row

pytest.importorskip("openai", reason="the bench extra is not installed")

from kvcomm_vllm.evaluation.report.break_even import break_even
from kvcomm_vllm.evaluation.report.latency import latency
from kvcomm_vllm.evaluation.report.load import load
from kvcomm_vllm.evaluation.report.memory import memory
from kvcomm_vllm.evaluation.report.pairs import ALL
from kvcomm_vllm.evaluation.report.quality import quality
from kvcomm_vllm.evaluation.report.read import Run, read_run
from kvcomm_vllm.evaluation.report.reuse import reuse
from kvcomm_vllm.evaluation.report.stream import stream
from kvcomm_vllm.evaluation.workloads.rows import DataError


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
    found = latency(run, "math", "anchor")
    assert found is not None
    assert (found.every.calls, found.every.p50, found.every.total_s) == (3, 150.0, 0.8)
    assert found.every.ratios["plain"].value == 1200 / 800
    assert found.warmup is not None
    assert found.warmed is not None
    assert found.warmup.ratios["plain"].value == 900 / 600
    assert found.warmed.ratios["plain"].value == 300 / 200
    assert found.floor is not None
    assert (found.floor.value, found.full_hit_ms) == (800 / 30, 10.0)


def test_calls_are_compared_with_the_same_call_only(tmp_path: Path) -> None:
    anchor = one_call_tasks("anchor", [600.0, 50.0])
    plain = [call_row("plain", "task 1", 0, ttft_ms=45.0), task_row("plain", "task 1")]
    # the warm-up has no counterpart, the other task is a warm-up on neither side
    found = latency(run_of(tmp_path, *anchor, *plain), "math", "anchor")
    assert found is not None
    assert found.every.ratios["plain"].value == 45 / 50
    assert found.slower == 1.0


def test_reusing_calls_and_the_rest_are_told_apart(tmp_path: Path) -> None:
    calls = [call_row("seam", "a", index) for index in range(3)]
    found = latency(run_of(tmp_path, *calls, task_row("seam", "a")), "math", "seam")
    assert found is not None
    assert found.reusing is not None
    assert found.rest is not None
    assert (found.reusing.calls, found.rest.calls) == (2, 1)
    assert list(found.agents) == ["Reader", "Planner", "Solver"]


def test_without_counts_no_call_is_said_to_reuse_or_not(tmp_path: Path) -> None:
    run = run_of(tmp_path, call_row("plain", "a", 1), task_row("plain", "a"))
    times, tokens = latency(run, "math", "plain"), reuse(run, "math", "plain")
    assert times is not None
    assert tokens is not None
    assert (times.reusing, times.rest, tokens.reused, tokens.fully) == (None, None, None, None)
    assert tokens.local == 128, "the server's own count of cached tokens"


def test_shares_of_tokens_are_over_prompt_repeated_and_quoted(tmp_path: Path) -> None:
    counts = {"prompt_tokens": 1000, "repeated_tokens": 900, "local": 100, "reused": 720}
    rows = [call_row("seam", "a", 1, computed=180, **counts), task_row("seam", "a")]
    found = reuse(run_of(tmp_path, *rows), "math", "seam")
    assert found is not None
    assert (found.of_prompt, found.of_repeated, found.of_quoted) == (0.82, 820 / 900, 720 / 800)


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
    found = reuse(run_of(tmp_path, *rows, settings=settings), "math", "seam")
    assert found is not None
    assert (found.quoting, found.reusing, found.fully) == (1, 1, fully)


def test_the_rest_of_a_page_of_the_own_prefix_is_no_quote(tmp_path: Path) -> None:
    counts = {"repeated_tokens": 131, "local": 100, "reused": 0}
    rows = [call_row("seam", "a", 0, **counts), task_row("seam", "a")]
    found = reuse(run_of(tmp_path, *rows, settings=SETTINGS), "math", "seam")
    assert found is not None
    assert found.quoting == 0


def scored(column: str, scores: list[float], **fields: Any) -> list[Row]:
    return [
        task_row(column, f"task {number}", score=score, **fields)
        for number, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("wrong", "tasks", "worse"), [(10, 20, True), (1, 20, False), (4, 4, False), (0, 20, False)]
)
def test_only_a_drop_that_is_no_chance_is_called_significant(
    tmp_path: Path, wrong: int, tasks: int, worse: bool
) -> None:
    ours = [0.0] * wrong + [1.0] * (tasks - wrong)
    run = run_of(tmp_path, *scored("plain", [1.0] * tasks), *scored("anchor", ours))
    found = quality(run, "math", "anchor")
    assert found is not None
    assert found.difference is not None
    assert found.difference.value == pytest.approx(-wrong / tasks)
    assert found.worse == worse


def test_tasks_of_a_group_are_drawn_together(tmp_path: Path) -> None:
    groups = [task_row(c, f"t{n}", group=f"g{n // 2}") for c in ("plain", "seam") for n in range(8)]
    found = quality(run_of(tmp_path, *groups), ALL, "seam")
    assert found is not None
    assert found.difference is not None
    assert found.difference.units == 4


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
    found = quality(run, "math", "anchor")
    assert found is not None
    assert (found.compared, found.equal_answers, found.equal_start) == (2, 0.5, 0.75)


def test_judges_are_consistent_where_both_orders_end_in_one_choice(tmp_path: Path) -> None:
    choices = {"a": ("X", "X"), "b": ("X", "Y"), "c": (None, None)}
    rows = [
        task_row("seam", f"{group}{order}", group=group, choice=choice, score=None)
        for group, both in choices.items()
        for order, choice in enumerate(both)
    ]
    found = quality(run_of(tmp_path, *rows), "math", "seam")
    assert found is not None
    assert found.consistent == pytest.approx(1 / 3)
    assert found.score is None


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
    found = break_even(run_of(tmp_path, *calls_with_savings(saved, -100)), "math", "seam")
    assert found is not None
    assert found.saved is not None
    assert (found.saved.start, found.saved.slope) == pytest.approx((-30, 0.5))
    assert found.shared_tokens is not None
    assert found.shared_tokens.value == pytest.approx(60)
    assert (found.fewest_reused, found.warmup_cost_s) == (50, pytest.approx(0.1))
    # -100, -130, -135, -115, +5: ahead for good from the fifth call on
    assert found.calls_until_ahead == 5


def test_what_never_pays_has_no_break_even(tmp_path: Path) -> None:
    saved = {tokens: -30 - 0.1 * tokens for tokens in (0, 50, 100, 300, 700)}
    found = break_even(run_of(tmp_path, *calls_with_savings(saved)), "math", "seam")
    assert found is not None
    assert (found.shared_tokens, found.calls_until_ahead) == (None, None)


def test_times_are_fitted_to_prompt_length_without_warm_up(tmp_path: Path) -> None:
    lengths = [9999, 100, 200, 400, 800]
    rows = one_call_tasks("plain", [50.0 + 1.5 * length for length in lengths])
    calls = [row for row in rows if row["kind"] == "call"]
    for call, length in zip(calls, lengths, strict=True):
        call["prompt_tokens"] = length
    calls[0]["ttft_ms"] = 1.0
    found = break_even(run_of(tmp_path, *rows), "math", "plain")
    assert found is not None
    assert found.by_prompt is not None
    assert (found.by_prompt.start, found.by_prompt.slope) == pytest.approx((50, 1.5))
    assert (found.saved, found.calls_until_ahead) == (None, None)


def streamed(savings: list[float]) -> list[Row]:
    plain = one_call_tasks("plain", [1000.0] * (len(savings) + 1), phase="stream")
    ours = [5000.0, *(1000 * (1 - saving) for saving in savings)]
    return [*plain, *one_call_tasks("anchor", ours, phase="stream")]


def test_a_saving_that_decays_over_a_stream_shows(tmp_path: Path) -> None:
    found = stream(
        run_of(tmp_path, *streamed([0.8] * 100 + [0.6] * 100 + [0.4] * 100)), ALL, "anchor"
    )
    assert found is not None
    assert [(w.first, w.last) for w in found.windows] == [(1, 100), (101, 200), (201, 300)]
    assert [w.saving for w in found.windows] == pytest.approx([0.8, 0.6, 0.4])
    assert [w.typical for w in found.windows] == pytest.approx([0.8, 0.6, 0.4])
    assert found.lasting is not None
    assert found.lasting.value == pytest.approx(0.5)


def test_a_late_call_moves_the_saving_but_not_the_typical_one(tmp_path: Path) -> None:
    found = stream(run_of(tmp_path, *streamed([0.5] * 199 + [-99.0])), ALL, "anchor")
    assert found is not None
    assert found.windows[1].saving < 0
    assert found.windows[1].typical == 0.5


def test_a_short_stream_is_cut_into_thirds(tmp_path: Path) -> None:
    found = stream(run_of(tmp_path, *streamed([0.5] * 20)), ALL, "anchor")
    assert found is not None
    assert [(w.first, w.last) for w in found.windows] == [(1, 6), (7, 12), (13, 20)]
    assert stream(run_of(tmp_path, *streamed([])), ALL, "anchor") is None


def test_throughput_is_from_the_first_arrival_to_the_last_end(tmp_path: Path) -> None:
    rows = []
    for number, (arrival, seconds) in enumerate([(10.0, 5.0), (12.0, 8.0), (16.0, 2.0)]):
        common = {"phase": "load", "at_s": arrival}
        rows.append(call_row("seam", f"t{number}", 0, output_tokens=20, **common))
        rows.append(task_row("seam", f"t{number}", seconds=seconds, **common))
    found = load(run_of(tmp_path, *rows), "math", "seam")
    assert found is not None
    assert found.seconds == 10.0
    assert (found.tasks_per_s, found.tokens_per_s) == (0.3, 6.0)
    assert found.arrivals_per_s == pytest.approx(2 / 6)
    assert found.task_p50 == 5.0


def test_memory_growth_leaves_out_warm_up_and_earlier_sessions(tmp_path: Path) -> None:
    looks = [(0, False, 900.0), (1, True, 100.0), (1, False, 500.0), (1, False, 520.0)]
    rows: list[Row] = [
        {
            "kind": "memory",
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
    (found,) = memory(run_of(tmp_path, *rows))
    assert (found.first_mb, found.last_mb, found.most_mb) == (500.0, 520.0, 900.0)
    assert found.most_kv == pytest.approx(0.3)


def test_columns_of_one_server_are_one_line_of_memory(tmp_path: Path) -> None:
    look = {"kind": "memory", "task": "t", "kv_usage": 0.5, "slots": None, "anchors": None}
    rows = [
        {**look, "column": column, "resident_mb": mb}
        for column, mb in (("plain", 10.0), ("anchor", 20.0), ("seam", 30.0))
    ]
    found = memory(run_of(tmp_path, *rows, settings=SETTINGS))
    assert [(server.server, server.most_mb) for server in found] == [("plain", 10), ("kvcomm", 30)]
