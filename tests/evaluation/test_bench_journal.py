# SPDX-License-Identifier: Apache-2.0
"""An interrupted run goes on behind the last unit that was kept in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the bench extra is not installed")

from bench_tasks import call_record, relay

from kvcomm_vllm.evaluation.bench.journal import Journal
from kvcomm_vllm.evaluation.bench.plan import Study, Unit
from kvcomm_vllm.evaluation.bench.records import (
    LOAD,
    LOCKSTEP,
    MemoryRecord,
    Record,
    SkipRecord,
    Stand,
    TaskRecord,
)

COLUMNS = ("plain", "seam")
A, B, W = relay("a"), relay("b"), relay("w")
STUDY = Study(LOCKSTEP, "work", "s", W, (Unit(0, (A,), COLUMNS), Unit(1, (B,), COLUMNS)))
LOADED = Study(LOAD, "work", "s", W, tuple(Unit(n, (A, B), (c,)) for n, c in enumerate(COLUMNS)))


def records(task: str, columns: tuple[str, ...] = COLUMNS, **more: Any) -> list[Record]:
    """A call and an end per column, and the memory of one server."""
    stand = Stand("work", **{"phase": LOCKSTEP, "task": task, **more})
    found: list[Record] = [call_record(stand, column, 0) for column in columns]
    found += [
        TaskRecord(
            **vars(stand),
            column=column,
            seconds=1.0,
            answer="x",
            score=None,
            group="",
            choice=None,
        )
        for column in columns
    ]
    held = {"kv_usage": 0.0, "resident_mb": 1.0, "slots": None, "anchors": None}
    found.append(MemoryRecord(**vars(stand), column=columns[0], **held))
    return found


def kinds(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "records.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["kind"], row["task"]) for row in rows]


def test_what_was_written_is_complete_for_the_next_session(tmp_path: Path) -> None:
    journal = Journal(tmp_path, [STUDY])
    assert journal.remaining(STUDY) == list(STUDY.units)
    journal.write(records("a"))
    assert journal.remaining(STUDY) == [STUDY.units[1]]
    again = Journal(tmp_path, [STUDY])
    assert again.remaining(STUDY) == [STUDY.units[1]]
    again.write(records("b"))
    assert not Journal(tmp_path, [STUDY]).remaining(STUDY)


def test_a_unit_that_was_cut_off_is_forgotten(tmp_path: Path) -> None:
    Journal(tmp_path, [STUDY]).write([*records("a"), *records("b")])
    path = tmp_path / "records.jsonl"
    text = path.read_text()
    *_, memory = text.splitlines()
    second_end = text.rindex('{"kind": "task"')
    path.write_text(text[: second_end + 40])
    assert memory not in path.read_text()
    journal = Journal(tmp_path, [STUDY])
    assert journal.remaining(STUDY) == [STUDY.units[1]]
    assert {task for _, task in kinds(tmp_path)} == {"a"}
    journal.write(records("b"))
    whole = [kind for kind, _ in kinds(tmp_path)]
    assert whole == ["call", "call", "task", "task", "memory"] * 2


def test_a_skipped_task_is_not_tried_again(tmp_path: Path) -> None:
    columns = list(COLUMNS)
    skip = SkipRecord("work", LOCKSTEP, "a", column="seam", columns=columns, error="too long")
    Journal(tmp_path, [STUDY]).write([skip])
    assert Journal(tmp_path, [STUDY]).remaining(STUDY) == [STUDY.units[1]]


def test_warm_ups_are_kept_and_count_for_nothing(tmp_path: Path) -> None:
    Journal(tmp_path, [STUDY]).write(records("a", warmup=True))
    journal = Journal(tmp_path, [STUDY])
    assert journal.remaining(STUDY) == list(STUDY.units)
    assert [kind for kind, _ in kinds(tmp_path)][:2] == ["call", "call"]


def test_a_line_that_was_cut_off_is_gone_before_another_one_is_written(tmp_path: Path) -> None:
    Journal(tmp_path, [STUDY]).write(records("a"))
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text()[:-9])
    Journal(tmp_path, [STUDY]).write(records("b"))
    assert [task for kind, task in kinds(tmp_path) if kind == "task"] == ["a", "a", "b", "b"]


def test_under_load_each_column_is_a_unit_of_all_its_tasks(tmp_path: Path) -> None:
    journal = Journal(tmp_path, [LOADED])
    journal.write([*records("a", ("plain",), phase=LOAD), *records("b", ("plain",), phase=LOAD)])
    journal.write(records("a", ("seam",), phase=LOAD))
    again = Journal(tmp_path, [LOADED])
    assert again.remaining(LOADED) == [LOADED.units[1]]
    rows = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert {row["column"] for row in rows} == {"plain"}
    assert len(rows) == 6


def test_phases_do_not_answer_for_each_other(tmp_path: Path) -> None:
    Journal(tmp_path, [STUDY, LOADED]).write(records("a"))
    again = Journal(tmp_path, [STUDY, LOADED])
    assert again.remaining(STUDY) == [STUDY.units[1]]
    assert again.remaining(LOADED) == list(LOADED.units)
