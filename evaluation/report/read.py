# SPDX-License-Identifier: Apache-2.0
"""A run as it lies in its folder: settings, and the records of whole tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from kvcomm_vllm.evaluation.bench.records import (
    LOCKSTEP,
    CallRecord,
    MemoryRecord,
    SkipRecord,
    TaskRecord,
)
from kvcomm_vllm.evaluation.workloads.rows import DataError

SPOKEN_OF = ("anchor", "seam", "rotate", "paper")  # the first one there is

AnyRecord = TypeVar("AnyRecord", CallRecord, TaskRecord, MemoryRecord, SkipRecord)
Key = tuple[str, str, str, str, int]


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
        found = dict.fromkeys(
            [task.column for task in self.tasks] + [look.column for look in self.memory]
        )
        wanted = [name for name in names(self.settings.get("columns")) if name in found]
        return list(dict.fromkeys([*wanted, *found]))

    @property
    def absent(self) -> list[str]:
        """Columns that were asked for and have no record."""
        return [n for n in names(self.settings.get("columns")) if n not in self.columns]

    def workloads(self, phase: str = LOCKSTEP) -> list[str]:
        """Workloads with a task that ended in a phase, in the order of their appearance."""
        return list(dict.fromkeys(task.workload for task in self.tasks if task.phase == phase))

    def refusal(self, column: str) -> str | None:
        """Why a column was not served, in the server's words."""
        reason = self._column(column).get("not_served")
        return None if reason is None else str(reason)

    def server(self, column: str) -> str:
        """The server of a column, which may serve others, too."""
        return str(self._column(column).get("server") or column)

    def _column(self, column: str) -> dict[str, Any]:
        columns = self.settings.get("columns")
        known = columns.get(column) if isinstance(columns, dict) else None
        return known if isinstance(known, dict) else {}

    def setting(self, name: str) -> Any:
        """A setting by name, wherever it stands in the settings; None without it."""
        return _find(self.settings, name)


def names(value: Any) -> list[str]:
    """The names in a list, the keys of a mapping, or the parts of "a,b"."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [str(name) for name in value] if isinstance(value, list | dict) else []


def _find(value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        return None
    if name in value:
        return value[name]
    found = (_find(inner, name) for inner in value.values())
    return next((inner for inner in found if inner is not None), None)


def read_run(folder: Path) -> Run:
    """Read run.json and records.jsonl.

    A task that was begun again after an interruption counts once, with the records of its last
    session. A last line that was cut off is left out.

    Errors: DataError for a folder without records, or a line that is no record.
    """
    path = folder / "records.jsonl"
    if not path.exists():
        raise DataError(f"{folder} has no records.jsonl: it is not a folder of kvcomm bench")
    calls: list[CallRecord] = []
    tasks: dict[Key, TaskRecord] = {}
    memory, skips = [], []
    for number, line in _lines(path):
        try:
            kind = line.pop("kind")
            if kind == "call":
                calls.append(_record(CallRecord, line))
            elif kind == "task":
                task = _record(TaskRecord, line)
                tasks[_key(task)] = task
            elif kind == "memory":
                memory.append(_record(MemoryRecord, line))
            elif kind == "skip":
                skips.append(_record(SkipRecord, line))
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not a record ({error})") from error
    last = {key: task.session for key, task in tasks.items()}
    whole = [call for call in calls if last.get(_key(call)) == call.session]
    settings = folder / "run.json"
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    return Run(known, whole, list(tasks.values()), memory, skips, len(calls) - len(whole))


def _key(record: CallRecord | TaskRecord) -> Key:
    """One task on one column; each session has a warm-up of its own."""
    session = record.session if record.warmup else -1
    return record.workload, record.phase, record.task, record.column, session


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a record")
        yield number, row


def _record(kind: type[AnyRecord], row: dict[str, Any]) -> AnyRecord:
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in row.items() if name in known})
