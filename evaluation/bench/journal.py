# SPDX-License-Identifier: Apache-2.0
"""The records of a run in its folder: written unit by unit, so that a run can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvcomm_vllm.evaluation.bench.plan import Study, Unit
from kvcomm_vllm.evaluation.bench.records import (
    LOAD,
    CallRecord,
    MemoryRecord,
    Record,
    SkipRecord,
    TaskRecord,
)

RECORDS = "records.jsonl"
KINDS: dict[type[Record], str] = {
    CallRecord: "call",
    TaskRecord: "task",
    MemoryRecord: "memory",
    SkipRecord: "skip",
}
Row = dict[str, Any]
# phase, workload, task, column
End = tuple[str, str, str, str]


class Journal:
    """What is done of a plan, and where more is written.

    Args:
        studies: the plan; a unit of which some records are missing is forgotten, to be done again.
    """

    def __init__(self, folder: Path, studies: list[Study]) -> None:
        self.path = folder / RECORDS
        self._ended: set[End] = set()
        rows = _rows(self.path)
        for row in rows:
            self._note(row)
        lost = {
            end
            for study in studies
            for unit in study.units
            if not self.complete(study, unit)
            for end in _ends(study, unit)
        }
        self._ended -= lost
        kept = [row for row in rows if row["warmup"] or not _touches(row, lost)]
        if len(kept) < len(rows):
            self._rewrite(kept)

    def complete(self, study: Study, unit: Unit) -> bool:
        return _ends(study, unit) <= self._ended

    def remaining(self, study: Study) -> list[Unit]:
        return [unit for unit in study.units if not self.complete(study, unit)]

    def write(self, records: Iterable[Record]) -> None:
        """Add the records of a unit, all or none."""
        rows = [{"kind": KINDS[type(record)], **asdict(record)} for record in records]
        with self.path.open("ab") as sink:
            sink.write(_lines(rows))
            sink.flush()
            os.fsync(sink.fileno())
        for row in rows:
            self._note(row)

    def _note(self, row: Row) -> None:
        if row["warmup"] or row["kind"] not in ("task", "skip"):
            return
        for column in row.get("columns", [row["column"]]):
            self._ended.add((row["phase"], row["workload"], row["task"], column))

    def _rewrite(self, rows: list[Row]) -> None:
        draft = self.path.with_suffix(".draft")
        draft.write_bytes(_lines(rows))
        draft.replace(self.path)


def _ends(study: Study, unit: Unit) -> set[End]:
    return {
        (study.phase, study.workload, task.id, column)
        for task in unit.tasks
        for column in unit.columns
    }


def _touches(row: Row, lost: set[End]) -> bool:
    place = (row["phase"], row["workload"], row["task"])
    if row["kind"] == "memory" and row["phase"] != LOAD:
        return any(end[:3] == place for end in lost)
    return (*place, row["column"]) in lost


def _rows(path: Path) -> list[Row]:
    """All rows; the last one may have been cut off."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise
    return rows


def _lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
