# SPDX-License-Identifier: Apache-2.0
"""Carries a plan out, unit by unit, and keeps what comes of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rich.progress import Progress, TaskID

from kvcomm_vllm.cli.bench.driver import Driver, Place
from kvcomm_vllm.cli.bench.journal import Journal
from kvcomm_vllm.cli.bench.load import run_load
from kvcomm_vllm.cli.bench.lockstep import Rest, run_task
from kvcomm_vllm.cli.bench.memory import look
from kvcomm_vllm.cli.bench.plan import LOAD, STREAM, Study, Unit, rotated
from kvcomm_vllm.cli.bench.records import MemoryRecord, Record
from kvcomm_vllm.cli.bench.servers import Served
from kvcomm_vllm.cli.bench.task import Task

STREAM_MEMORY_TASKS = 10
REPRESENTATIVES = ("plain", "anchor")


@dataclass
class Runner:
    """
    Args:
        drivers: by column.
        clock: seconds since the session began.
        session: see ``records``.
    """

    drivers: dict[str, Driver]
    servers: dict[str, Served]
    journal: Journal
    rest: Rest
    progress: Progress
    clock: Callable[[], float]
    session: int = 0
    _warm: set[tuple[str, str]] = field(default_factory=set)

    def run(self, studies: list[Study]) -> None:
        """What of the plan is not in the journal yet.

        Raises:
            RequestError: a server does not serve at all.
        """
        for study in studies:
            remaining = self.journal.remaining(study)
            if not remaining:
                continue
            bar = self.progress.add_task(study.workload, total=len(study.units))
            began = self.clock()
            try:
                self._warm_up(study, bar)
                for unit in remaining:
                    done = len(study.units) - len(self.journal.remaining(study))
                    self.progress.update(bar, completed=done)
                    self._unit(study, unit, bar)
            finally:
                self.progress.remove_task(bar)
            spent = f"{len(remaining)} of {len(study.units)} done in {self.clock() - began:.0f} s"
            self.progress.console.print(f"  {study.workload} ({study.phase}): {spent}")

    def _warm_up(self, study: Study, bar: TaskID) -> None:
        """System prompts are cached and code has run before anything is timed."""
        if (study.workload, study.warmup_phase) in self._warm:
            return
        columns = dict.fromkeys(name for unit in study.units for name in unit.columns)
        place = self._place(study, study.warmup, warmup=True)
        self.journal.write(self._task(study, study.warmup, place, list(columns), bar))
        self._warm.add((study.workload, study.warmup_phase))

    def _unit(self, study: Study, unit: Unit, bar: TaskID) -> None:
        if study.phase == LOAD:
            self.journal.write(self._load(study, unit, bar))
            return
        (task,) = unit.tasks
        place = self._place(study, task)
        servers = {name: self.drivers[name].column.server for name in unit.columns}
        order = rotated(unit.columns, servers, unit.number)
        records = self._task(study, task, place, order, bar)
        if study.phase != STREAM or (unit.number + 1) % STREAM_MEMORY_TASKS == 0:
            records += self._memory(place, unit.columns)
        self.journal.write(records)

    def _place(self, study: Study, task: Task, warmup: bool = False) -> Place:
        phase = study.warmup_phase if warmup else study.phase
        return Place(study.workload, phase, task.id, warmup, self.session)

    def _task(
        self, study: Study, task: Task, place: Place, columns: list[str], bar: TaskID
    ) -> list[Record]:
        return run_task(
            task,
            place,
            [self.drivers[name] for name in columns],
            self.rest,
            self.clock,
            side_by_side=study.phase != STREAM,
            step=self._step(study, bar),
        )

    def _load(self, study: Study, unit: Unit, bar: TaskID) -> list[Record]:
        (name,) = unit.columns
        driver = self.drivers[name]
        self.rest.before()
        records = run_load(
            list(unit.tasks),
            list(unit.times),
            lambda task: self._place(study, task),
            driver.unobserved(),
            self.clock,
            self._step(study, bar),
        )
        driver.settle()
        self.rest.after()
        memory = self._memory(self._place(study, unit.tasks[-1]), unit.columns)
        return [*records, *(replace(record, column=name) for record in memory)]

    def _step(self, study: Study, bar: TaskID) -> Callable[[str], None]:
        def step(what: str) -> None:
            title = f"{study.workload} ({study.phase}): {what}"
            self.progress.update(bar, description=title)

        return step

    def _memory(self, place: Place, columns: tuple[str, ...]) -> list[Record]:
        """One record per server that was started here."""
        of_server: dict[str, str] = {}
        for name in sorted(columns, key=lambda name: name not in REPRESENTATIVES):
            of_server.setdefault(self.drivers[name].column.server, name)
        return [
            MemoryRecord(**place.fields(), column=name, at_s=self.clock(), **look(served.server))
            for server, name in of_server.items()
            if (served := self.servers[server]).server is not None
        ]


def stopwatch() -> Callable[[], float]:
    """Seconds since now."""
    began = time.monotonic()
    return lambda: time.monotonic() - began
