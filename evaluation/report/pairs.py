# SPDX-License-Identifier: Apache-2.0
"""The same call on two columns, and what is drawn together in a resample."""

from __future__ import annotations

from kvcomm_vllm.evaluation.bench.records import LOCKSTEP, CallRecord, TaskRecord
from kvcomm_vllm.evaluation.report.read import Run

ALL = "all workloads"

Pair = tuple[CallRecord, CallRecord]


def in_workload(record: CallRecord | TaskRecord, workload: str) -> bool:
    """Whether a record belongs to a workload, or to :data:`ALL` of them."""
    return workload in (ALL, record.workload)


def calls_of(run: Run, workload: str, column: str, phase: str = LOCKSTEP) -> list[CallRecord]:
    """Calls of a column, in the order in which they were made."""
    return [
        call
        for call in run.calls
        if call.phase == phase and call.column == column and in_workload(call, workload)
    ]


def tasks_of(run: Run, workload: str, column: str, phase: str = LOCKSTEP) -> list[TaskRecord]:
    """Tasks of a column, in the order in which they ended."""
    return [
        task
        for task in run.tasks
        if task.phase == phase and task.column == column and in_workload(task, workload)
    ]


def pair_calls(calls: list[CallRecord], others: list[CallRecord]) -> list[Pair]:
    """Each of ``calls`` with the one of ``others`` that has its task and number."""
    known = {(unit(call), call.index): call for call in others}
    keys = ((call, (unit(call), call.index)) for call in calls)
    return [(call, known[key]) for call, key in keys if key in known]


def pair_tasks(
    tasks: list[TaskRecord], others: list[TaskRecord]
) -> list[tuple[TaskRecord, TaskRecord]]:
    """Each of ``tasks`` with the same one among ``others``."""
    known = {unit(task): task for task in others}
    return [(task, known[unit(task)]) for task in tasks if unit(task) in known]


def unit(record: CallRecord | TaskRecord) -> tuple[str, str, int]:
    """What a resample draws as a whole: a task; each session has a warm-up of its own."""
    return record.workload, record.task, record.session if record.warmup else -1


def group(task: TaskRecord) -> tuple[str, str]:
    """What a resample of scores draws as a whole: the tasks of a group, else the task."""
    return task.workload, task.group or task.task
