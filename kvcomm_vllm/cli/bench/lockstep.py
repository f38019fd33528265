# SPDX-License-Identifier: Apache-2.0
"""One task on several columns, one request at a time: side by side, or one column after another."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvcomm_vllm.cli.bench.driver import Driver, Place
from kvcomm_vllm.cli.bench.records import CallRecord, Record, SkipRecord, TaskRecord
from kvcomm_vllm.cli.bench.task import Call, Steps, Task
from kvcomm_vllm.cli.client import RefusedError


@dataclass
class Rest:
    """Lets servers come to rest before one is asked: right behind another request, one takes once
    or twice as long, by chance.

    Args:
        seconds: how long a server's processes are busy after an answer.
    """

    seconds: float
    _ended: float | None = None

    def before(self) -> None:
        if self._ended is not None:
            time.sleep(max(0.0, self._ended + self.seconds - time.monotonic()))

    def after(self) -> None:
        self._ended = time.monotonic()


@dataclass
class Running:
    """A task under way on one column; ``call`` is None once it has an answer."""

    driver: Driver
    steps: Steps
    at: float
    call: Call | None = None
    answer: str = ""
    records: list[CallRecord] = field(default_factory=list)

    def go(self, said: str | None) -> None:
        """On to the task's next call."""
        try:
            self.call = next(self.steps) if said is None else self.steps.send(said)
        except StopIteration as end:
            self.call, self.answer = None, end.value

    def ask(self, place: Place) -> None:
        assert self.call is not None
        said, record = self.driver.ask(self.call, len(self.records), place)
        self.records.append(record)
        self.go(said)

    def result(self, task: Task, place: Place, seconds: float | None = None) -> TaskRecord:
        """After the last call; ``seconds`` if they are more than the calls'."""
        spent = sum(record.total_ms for record in self.records) / 1e3
        return TaskRecord(
            **place.fields(),
            column=self.driver.column.name,
            seconds=spent if seconds is None else seconds,
            answer=self.answer,
            score=None if task.score is None else task.score(self.answer),
            group=task.group,
            choice=None if task.choice is None else task.choice(self.answer),
            at_s=self.at,
        )


def skipped(
    place: Place, column: str, columns: list[str], error: Exception, at: float
) -> SkipRecord:
    return SkipRecord(**place.fields(), column=column, columns=columns, error=str(error), at_s=at)


def run_task(
    task: Task,
    place: Place,
    drivers: list[Driver],
    rest: Rest,
    clock: Callable[[], float],
    *,
    side_by_side: bool = True,
    step: Callable[[str], None] = lambda what: None,
) -> list[Record]:
    """
    Args:
        drivers: in the order in which they are asked first; for the next call it is reversed.
        side_by_side: a call goes to every column before the next call does; else a column is done
            with the task before the next one begins.
        step: told of every call as it begins.

    Returns its records, in the order in which they came about; a skip alone if a server refused.

    Raises:
        RequestError: a server does not serve at all.
    """
    order: list[CallRecord] = []
    done: list[Running] = []
    for group in [drivers] if side_by_side else [[driver] for driver in drivers]:
        started = [Running(driver, task.steps(), clock()) for driver in group]
        for one in started:
            one.go(None)
        turn = started
        while any(one.call for one in turn):
            for one in turn:
                if one.call is None:
                    continue
                column = one.driver.column
                step(f"{task.id}, {one.call.agent}, {column.name}")
                rest.before()
                try:
                    one.ask(place)
                except RefusedError as error:
                    names = [driver.column.name for driver in drivers]
                    return [skipped(place, column.name, names, error, clock())]
                rest.after()
                order.append(one.records[-1])
            # there and back again: whoever was first comes last
            turn = turn[::-1]
        done += started
    return [*order, *(one.result(task, place) for one in done)]
