# SPDX-License-Identifier: Apache-2.0
"""The records of a run in its folder: written unit by unit, so that a run can be continued."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from kvcomm_vllm.evaluation.bench.plan import Study, Unit
from kvcomm_vllm.evaluation.bench.records import (
    LOAD,
    RECORDS,
    MemoryRecord,
    Record,
    SkipRecord,
    TaskRecord,
    lines_of,
    read_records,
)

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
        records = read_records(self.path)
        self._note(records)
        lost = {
            end for study in studies for unit in self.remaining(study) for end in _ends(study, unit)
        }
        self._ended -= lost
        kept = [one for one in records if one.warmup or not _touches(one, lost)]
        if self.path.exists() and self.path.read_bytes() != lines_of(kept):
            draft = self.path.with_suffix(".draft")
            draft.write_bytes(lines_of(kept))
            draft.replace(self.path)

    def remaining(self, study: Study) -> list[Unit]:
        """What of a study is to be done."""
        return [unit for unit in study.units if not _ends(study, unit) <= self._ended]

    def write(self, records: list[Record]) -> None:
        """Add the records of a unit, all or none."""
        with self.path.open("ab") as sink:
            sink.write(lines_of(records))
            sink.flush()
            os.fsync(sink.fileno())
        self._note(records)

    def _note(self, records: Iterable[Record]) -> None:
        for one in records:
            if isinstance(one, TaskRecord | SkipRecord) and not one.warmup:
                columns = one.columns if isinstance(one, SkipRecord) else [one.column]
                self._ended |= {(one.phase, one.workload, one.task, name) for name in columns}


def _ends(study: Study, unit: Unit) -> set[End]:
    return {
        (study.phase, study.workload, task.id, column)
        for task in unit.tasks
        for column in unit.columns
    }


def _touches(record: Record, lost: set[End]) -> bool:
    place = (record.phase, record.workload, record.task)
    if isinstance(record, MemoryRecord) and record.phase != LOAD:
        return any(end[:3] == place for end in lost)
    return (*place, record.column) in lost
