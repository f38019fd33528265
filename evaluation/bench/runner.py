# SPDX-License-Identifier: Apache-2.0
"""Carries a plan out, unit by unit, and keeps what comes of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rich.progress import Progress, TaskID

from kvcomm_vllm.evaluation.bench.driver import Driver, Stand
from kvcomm_vllm.evaluation.bench.journal import Journal
from kvcomm_vllm.evaluation.bench.load import run_load
from kvcomm_vllm.evaluation.bench.lockstep import Floor, Rest, run_task
from kvcomm_vllm.evaluation.bench.plan import Study, Unit, rotated
from kvcomm_vllm.evaluation.bench.records import LOAD, STREAM, MemoryRecord, Record
from kvcomm_vllm.evaluation.bench.servers import Served
from kvcomm_vllm.evaluation.serving.memory import look
from kvcomm_vllm.evaluation.workloads.task import Task

STREAM_MEMORY_TASKS = 10
REPRESENTATIVES = ("plain", "anchor")


@dataclass
class Runner:
    """Does a plan's units in their order.

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
        stand = self._stand(study, study.warmup, warmup=True)
        self.journal.write(self._task(study, study.warmup, stand, list(columns), bar))
        self._warm.add((study.workload, study.warmup_phase))

    def _unit(self, study: Study, unit: Unit, bar: TaskID) -> None:
        if study.phase == LOAD:
            self.journal.write(self._load(study, unit, bar))
            return
        (task,) = unit.tasks
        stand = self._stand(study, task)
        servers = {name: self.drivers[name].column.server for name in unit.columns}
        order = rotated(unit.columns, servers, unit.number)
        records = self._task(study, task, stand, order, bar)
        if study.phase != STREAM or (unit.number + 1) % STREAM_MEMORY_TASKS == 0:
            records += self._memory(stand, unit.columns)
        self.journal.write(records)

    def _stand(self, study: Study, task: Task, warmup: bool = False) -> Stand:
        phase = study.warmup_phase if warmup else study.phase
        return Stand(study.workload, phase, task.id, warmup, self.session)

    def _floor(self, study: Study, bar: TaskID) -> Floor:
        def step(what: str) -> None:
            title = f"{study.workload} ({study.phase}): {what}"
            self.progress.update(bar, description=title)

        return Floor(self.rest, self.clock, step)

    def _task(
        self, study: Study, task: Task, stand: Stand, columns: list[str], bar: TaskID
    ) -> list[Record]:
        drivers = [self.drivers[name] for name in columns]
        floor = self._floor(study, bar)
        return run_task(task, stand, drivers, floor, side_by_side=study.phase != STREAM)

    def _load(self, study: Study, unit: Unit, bar: TaskID) -> list[Record]:
        (name,) = unit.columns
        driver = self.drivers[name].unobserved()
        records = run_load(
            unit.tasks,
            unit.times,
            lambda task: self._stand(study, task),
            driver,
            self._floor(study, bar),
        )
        self.drivers[name].forget()
        self.rest.after()
        memory = self._memory(self._stand(study, unit.tasks[-1]), unit.columns)
        return [*records, *(replace(record, column=name) for record in memory)]

    def _memory(self, stand: Stand, columns: tuple[str, ...]) -> list[Record]:
        """One record per server that was started here."""
        of_server: dict[str, str] = {}
        for name in sorted(columns, key=lambda name: name not in REPRESENTATIVES):
            of_server.setdefault(self.drivers[name].column.server, name)
        return [
            MemoryRecord(**stand.fields(), column=name, at_s=self.clock(), **look(served.server))
            for server, name in of_server.items()
            if (served := self.servers[server]).server is not None
        ]


def stopwatch() -> Callable[[], float]:
    """Seconds since now."""
    began = time.monotonic()
    return lambda: time.monotonic() - began
