# SPDX-License-Identifier: Apache-2.0
"""What a run consists of, in the order in which it is done."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
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
    def warmup_phase(self) -> str:
        return LOCKSTEP if self.phase == LOAD else self.phase


def make_plan(options: Options, unserved: Container[str] = ()) -> list[Study]:
    """What the options come to, in the order in which it is done, but for columns that nobody
    serves.

    Raises:
        DataError: data that are unusable or too few.
    """
    names = tuple(column.name for column in options.columns if column.name not in unserved)
    cached = [column.name for column in options.columns if column.cached and column.name in names]
    lockstep, load = [], []
    for name, given in options.workloads.items():
        found = workload(name).make(options.data, options.seed, **given)
        timed = found.tasks[: min(options.tasks, len(found.tasks) - 1)]
        if not timed:
            raise DataError(f"{name}: {found.source} has too few tasks: one is for warming up")
        warmup = found.tasks[len(timed)]
        lockstep.append(Study(LOCKSTEP, name, found.source, warmup, _one_by_one(timed, names)))
        if options.rate or options.burst:
            units = _load(options, name, found, len(timed) + 1, cached)
            load.append(Study(LOAD, name, found.source, warmup, units))
    stream = tuple(name for name in STREAM_COLUMNS if name in names)
    studies = [*lockstep, *load, *([_stream(options, stream)] if options.stream else [])]
    return [study for study in studies if any(unit.columns for unit in study.units)]


def _one_by_one(tasks: Sequence[Task], columns: tuple[str, ...]) -> tuple[Unit, ...]:
    return tuple(Unit(number, (task,), columns) for number, task in enumerate(tasks))


def _load(
    options: Options, name: str, found: TaskSet, done: int, columns: list[str]
) -> tuple[Unit, ...]:
    """The same tasks at the same times on plain vLLM and each mode, one column after the other."""
    times = [0.0] * options.burst or arrivals(options.rate, options.load_seconds, options.seed)
    tasks = tuple(found.tasks[done : done + len(times)])
    if len(tasks) < len(times) or not times:
        raise DataError(
            f"{name}: {found.source} has {len(tasks)} tasks left for {len(times)} arrivals: change "
            "--rate, --load-seconds, --burst or --tasks"
        )
    return tuple(Unit(n, tasks, (column,), tuple(times)) for n, column in enumerate(columns))


def _stream(options: Options, columns: tuple[str, ...]) -> Study:
    found = workload(STREAM_WORKLOAD).make(options.data, options.seed, **options.stream_options)
    end = STREAM_FIRST + options.stream
    units = _one_by_one(found.tasks[STREAM_FIRST:end], columns)
    return Study(STREAM, STREAM_WORKLOAD, found.source, found.tasks[end], units)


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
