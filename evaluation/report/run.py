# SPDX-License-Identifier: Apache-2.0
"""A run as it lies in its folder: settings, and the records of whole tasks, also in pairs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvcomm_vllm.evaluation.bench.columns import PLAIN
from kvcomm_vllm.evaluation.bench.records import (
    LOCKSTEP,
    RECORDS,
    CallRecord,
    MemoryRecord,
    SkipRecord,
    TaskRecord,
    read_records,
)
from kvcomm_vllm.evaluation.workloads.rows import DataError

ALL = "all workloads"
SPOKEN_OF = ("anchor", "seam", "rotate", "paper")  # the first one there is

OfTask = TypeVar("OfTask", CallRecord, TaskRecord)
Pair = tuple[CallRecord, CallRecord]


@dataclass(frozen=True)
class Run:
    """Settings as written by the runner (any key may be missing), and what was recorded.

    ``incomplete`` counts calls of tasks that were interrupted; they are left out of ``calls``.
    """

    settings: dict[str, Any]
    calls: list[CallRecord]
    tasks: list[TaskRecord]
    memory: list[MemoryRecord]
    skips: list[SkipRecord]
    incomplete: int = 0

    @property
    def columns(self) -> list[str]:
        """Columns with records, in the order of the settings, else of their appearance."""
        records = [*self.tasks, *self.memory]
        found = dict.fromkeys(record.column for record in records)
        return list(dict.fromkeys([*(name for name in self.asked if name in found), *found]))

    @property
    def asked(self) -> dict[str, dict[str, Any]]:
        """Columns that were asked for, and what is known of each."""
        return self.setting("columns") or {}

    @property
    def main(self) -> str | None:
        """The column that is spoken of first; None if none has to do with the plugin."""
        ours = [name for name in self.columns if not name.startswith(PLAIN)]
        return next((name for name in SPOKEN_OF if name in ours), next(iter(ours), None))

    def workloads(self, phase: str = LOCKSTEP) -> list[str]:
        """Workloads with a task that ended in a phase, in the order of their appearance."""
        return list(dict.fromkeys(task.workload for task in self.tasks if task.phase == phase))

    @property
    def everything(self) -> str:
        """All workloads, or the only one."""
        names = self.workloads()
        return names[0] if len(names) == 1 else ALL

    def setting(self, *path: str) -> Any:
        """A setting by the keys that lead to it; None without it."""
        value: Any = self.settings
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def calls_of(self, workload: str, column: str, phase: str = LOCKSTEP) -> list[CallRecord]:
        """Calls of a column, in the order in which they were made."""
        return _chosen(self.calls, workload, column, phase)

    def tasks_of(self, workload: str, column: str, phase: str = LOCKSTEP) -> list[TaskRecord]:
        """Tasks of a column, in the order in which they ended."""
        return _chosen(self.tasks, workload, column, phase)

    def against(
        self, calls: list[CallRecord], column: str = PLAIN, phase: str = LOCKSTEP
    ) -> list[Pair]:
        """Each of these calls with the same one of another column, where that has it."""
        known = {(unit(c), c.index): c for c in self.calls_of(ALL, column, phase)}
        return [(c, known[key]) for c in calls if (key := (unit(c), c.index)) in known]

    def tasks_against(
        self, tasks: list[TaskRecord], column: str = PLAIN
    ) -> list[tuple[TaskRecord, TaskRecord]]:
        """Each of these tasks with the same one of another column."""
        known = {unit(task): task for task in self.tasks_of(ALL, column)}
        return [(task, known[unit(task)]) for task in tasks if unit(task) in known]


def _chosen(records: list[OfTask], workload: str, column: str, phase: str) -> list[OfTask]:
    return [
        one
        for one in records
        if one.phase == phase and one.column == column and workload in (ALL, one.workload)
    ]


def unit(record: CallRecord | TaskRecord) -> tuple[str, str, int]:
    """What a resample draws as a whole: a task; each session has a warm-up of its own."""
    return record.workload, record.task, record.session if record.warmup else -1


def read_run(folder: Path) -> Run:
    """Read run.json and records.jsonl.

    A task that was begun again after an interruption counts once, with the records of its last
    session.

    Raises:
        DataError: a folder without records, or a line that is no record.
    """
    path = folder / RECORDS
    if not path.exists():
        raise DataError(f"{folder} has no {RECORDS}: it is not a folder of kvcomm bench")
    records = read_records(path)
    settings = folder / "run.json"
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    ended = {_key(one): one for one in records if isinstance(one, TaskRecord)}
    calls = [one for one in records if isinstance(one, CallRecord)]
    last = {key: task.session for key, task in ended.items()}
    whole = [call for call in calls if last.get(_key(call)) == call.session]
    return Run(
        known,
        whole,
        list(ended.values()),
        [one for one in records if isinstance(one, MemoryRecord)],
        [one for one in records if isinstance(one, SkipRecord)],
        len(calls) - len(whole),
    )


def _key(record: CallRecord | TaskRecord) -> tuple[object, ...]:
    return record.phase, record.column, *unit(record)
