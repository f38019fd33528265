# SPDX-License-Identifier: Apache-2.0
"""Carries a plan out, unit by unit, and keeps what comes of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.progress import Progress, TaskID

from kvcomm_vllm.evaluation.bench.driver import Driver
from kvcomm_vllm.evaluation.bench.journal import Journal
from kvcomm_vllm.evaluation.bench.load import run_load
from kvcomm_vllm.evaluation.bench.lockstep import Floor, Rest, run_task
from kvcomm_vllm.evaluation.bench.plan import Study, Unit, rotated
from kvcomm_vllm.evaluation.bench.records import LOAD, STREAM, MemoryRecord, Record, Stand
from kvcomm_vllm.evaluation.bench.servers import Served
from kvcomm_vllm.evaluation.serving.memory import look

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
            began, done = self.clock(), len(study.units) - len(remaining)
            try:
                floor = self._floor(study, bar)
                self._warm_up(study, floor)
                for number, unit in enumerate(remaining):
                    self.progress.update(bar, completed=done + number)
                    self.journal.write(self._unit(study, unit, floor))
            finally:
                self.progress.remove_task(bar)
            spent = f"{len(remaining)} of {len(study.units)} done in {self.clock() - began:.0f} s"
            self.progress.console.print(f"  {study.workload} ({study.phase}): {spent}")

    def _floor(self, study: Study, bar: TaskID) -> Floor:
        def step(what: str) -> None:
            title = f"{study.workload} ({study.phase}): {what}"
            self.progress.update(bar, description=title)

        return Floor(self.rest, self.clock, step)

    def _warm_up(self, study: Study, floor: Floor) -> None:
        """System prompts are cached and code has run before anything is timed."""
        phase = study.warmup_phase
        if (study.workload, phase) in self._warm:
            return
        names = dict.fromkeys(name for unit in study.units for name in unit.columns)
        drivers = [self.drivers[name] for name in names]
        stand = Stand(study.workload, phase, study.warmup.id, True, self.session)
        side_by_side = study.phase != STREAM
        records = run_task(study.warmup, stand, drivers, floor, side_by_side=side_by_side)
        self.journal.write(records)
        self._warm.add((study.workload, phase))

    def _unit(self, study: Study, unit: Unit, floor: Floor) -> list[Record]:
        task = unit.tasks[-1]
        stand = Stand(study.workload, study.phase, task.id, session=self.session)
        if study.phase == LOAD:
            (driver,) = (self.drivers[name] for name in unit.columns)
            records = run_load(unit.tasks, unit.times, stand, driver.unobserved(), floor)
            driver.forget()
            self.rest.after()
            return [*records, *self._memory(stand, unit.columns)]
        servers = {name: self.drivers[name].column.server for name in unit.columns}
        drivers = [self.drivers[name] for name in rotated(unit.columns, servers, unit.number)]
        side_by_side = study.phase != STREAM
        records = run_task(task, stand, drivers, floor, side_by_side=side_by_side)
        if side_by_side or (unit.number + 1) % STREAM_MEMORY_TASKS == 0:
            records += self._memory(stand, unit.columns)
        return records

    def _memory(self, stand: Stand, columns: tuple[str, ...]) -> list[Record]:
        """One record per server that was started here."""
        of_server: dict[str, str] = {}
        for name in sorted(columns, key=lambda name: name not in REPRESENTATIVES):
            of_server.setdefault(self.drivers[name].column.server, name)
        return [
            MemoryRecord(**vars(stand), column=name, at_s=self.clock(), **look(served.server))
            for server, name in of_server.items()
            if (served := self.servers[server]).server is not None
        ]


def stopwatch() -> Callable[[], float]:
    """Seconds since now."""
    began = time.monotonic()
    return lambda: time.monotonic() - began
