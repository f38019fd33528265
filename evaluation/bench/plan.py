# SPDX-License-Identifier: Apache-2.0
"""What a run consists of, in the order in which it is done."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from kvcomm_vllm.evaluation.bench.load import arrivals
from kvcomm_vllm.evaluation.bench.options import Options
from kvcomm_vllm.evaluation.bench.presets import STREAM_COLUMNS, STREAM_FIRST, STREAM_WORKLOAD
from kvcomm_vllm.evaluation.bench.records import LOAD, LOCKSTEP, STREAM
from kvcomm_vllm.evaluation.workloads import workload
from kvcomm_vllm.evaluation.workloads.rows import DataError
from kvcomm_vllm.evaluation.workloads.task import Task, TaskSet

Item = TypeVar("Item")


@dataclass(frozen=True)
class Unit:
    """What is done in one go, and kept or lost as a whole.

    Args:
        number: of the unit in its study; the order of columns depends on it.
        times: when tasks arrive, in seconds; empty in other phases than ``load``.
    """

    number: int
    tasks: tuple[Task, ...]
    columns: tuple[str, ...]
    times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Study:
    """A workload in a phase.

    Args:
        source: where its data are from.
        warmup: the task that is run before all others; ``load`` shares it with ``lockstep``.
    """

    phase: str
    workload: str
    source: str
    warmup: Task
    units: tuple[Unit, ...]

    @property
    def tasks(self) -> int:
        return len({task.id for unit in self.units for task in unit.tasks})

    @property
    def warmup_phase(self) -> str:
        return LOCKSTEP if self.phase == LOAD else self.phase


def make_plan(options: Options) -> list[Study]:
    """What the options come to, in the order in which it is done.

    Raises:
        DataError: data that are unusable or too few.
    """
    names = [column.name for column in options.columns]
    lockstep, load = [], []
    for name, given in options.workloads.items():
        found = workload(name).make(options.data, options.seed, **given)
        timed = found.tasks[: min(options.tasks, len(found.tasks) - 1)]
        if not timed:
            raise DataError(f"{name}: {found.source} has too few tasks: one is for warming up")
        units = [Unit(number, (task,), tuple(names)) for number, task in enumerate(timed)]
        lockstep.append(Study(LOCKSTEP, name, found.source, found.tasks[len(timed)], tuple(units)))
        if options.rate or options.burst:
            load.append(_load(options, name, found, len(timed)))
    return [*lockstep, *load, *_stream(options, names)]


def _load(options: Options, name: str, found: TaskSet, done: int) -> Study:
    """The same tasks at the same times on plain vLLM and each mode, one column after the other."""
    times = [0.0] * options.burst or arrivals(options.rate, options.load_seconds, options.seed)
    tasks: Sequence[Task] = found.tasks[done + 1 : done + 1 + len(times)]
    if len(tasks) < len(times) or not times:
        raise DataError(
            f"{name}: {found.source} has {len(tasks)} tasks left for {len(times)} arrivals: change "
            "--rate, --load-seconds, --burst or --tasks"
        )
    columns = [column for column in options.columns if column.cached]
    units = [
        Unit(number, tuple(tasks), (column.name,), tuple(times))
        for number, column in enumerate(columns)
    ]
    return Study(LOAD, name, found.source, found.tasks[done], tuple(units))


def _stream(options: Options, names: list[str]) -> list[Study]:
    columns = tuple(name for name in STREAM_COLUMNS if name in names)
    if not options.stream or not columns:
        return []
    stream = workload(STREAM_WORKLOAD)
    found = stream.make(options.data, options.seed, **options.stream_options)
    first, last = STREAM_FIRST, STREAM_FIRST + options.stream
    units = tuple(
        Unit(number, (task,), columns) for number, task in enumerate(found.tasks[first:last])
    )
    return [Study(STREAM, STREAM_WORKLOAD, found.source, found.tasks[last], units)]


def rotated(columns: Sequence[str], servers: Mapping[str, str], number: int) -> list[str]:
    """The columns in the order of a unit: over the units everybody is first in turn, and columns
    of one server stay together, as servers have to be let come to rest in between.

    Args:
        servers: of each column.
    """
    groups: dict[str, list[str]] = {}
    for name in columns:
        groups.setdefault(servers[name], []).append(name)
    ordered = _turned(list(groups.values()), number)
    return [name for group in ordered for name in _turned(group, number // len(groups))]


def _turned(items: list[Item], number: int) -> list[Item]:
    turn = number % len(items)
    return [*items[turn:], *items[:turn]]


def without(studies: list[Study], unserved: Container[str]) -> list[Study]:
    """The plan without columns that nobody serves."""
    found = []
    for study in studies:
        units = [
            replace(unit, columns=tuple(name for name in unit.columns if name not in unserved))
            for unit in study.units
        ]
        found.append(replace(study, units=tuple(unit for unit in units if unit.columns)))
    return [study for study in found if study.units]
