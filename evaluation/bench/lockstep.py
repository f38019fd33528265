# SPDX-License-Identifier: Apache-2.0
"""One task on several columns, one request at a time: side by side, or one column after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from kvcomm_vllm.evaluation.bench.driver import Driver
from kvcomm_vllm.evaluation.bench.records import CallRecord, Record, SkipRecord, Stand, TaskRecord
from kvcomm_vllm.evaluation.serving.client import RefusedError
from kvcomm_vllm.evaluation.workloads.task import Task

# vLLM's processes poll their shared memory for a second after the last request (SpinCondition), on
# cores that the next request needs for its first token.
SPIN_SECONDS = 1.2


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
    """A task under way on one column.

    Args:
        said: the answers that are quoted onwards; ``texts``: what this column has answered.
    """

    driver: Driver
    task: Task
    stand: Stand
    at: float
    said: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    records: list[CallRecord] = field(default_factory=list)

    @property
    def column(self) -> str:
        return self.driver.column.name

    def ask(self) -> bool:
        """The next call; False once the task has its answer."""
        call = self.task.call(self.said)
        if call is None:
            return False
        text, record = self.driver.ask(call, len(self.records), self.stand)
        self.records.append(record)
        self.texts.append(text)
        self.said.append(text)
        return True

    def result(self, seconds: float | None = None) -> TaskRecord:
        """After the last call; ``seconds`` if they are more than the calls'."""
        spent = sum(record.total_ms for record in self.records) / 1e3
        task, answer = self.task, self.texts[-1]
        return TaskRecord(
            **vars(self.stand),
            column=self.column,
            seconds=spent if seconds is None else seconds,
            answer=answer,
            score=None if task.score is None else task.score(answer),
            group=task.group,
            choice=None if task.choice is None else task.choice(answer),
            at_s=self.at,
        )

    def skip(self, error: RefusedError, columns: list[str], at: float) -> SkipRecord:
        """Instead of a result."""
        return SkipRecord(
            **vars(self.stand), column=self.column, columns=columns, error=str(error), at_s=at
        )


@dataclass(frozen=True)
class Floor:
    """What requests that are sent one at a time need: a clock, rest, and somebody who is told.

    Args:
        clock: seconds since the session began.
        step: told of every call as it begins.
        heard: told of every round, when all columns have answered the same call.
    """

    rest: Rest
    clock: Callable[[], float]
    step: Callable[[str], None] = lambda what: None
    heard: Callable[[Sequence[Running]], None] = lambda turn: None


def play(
    task: Task, stand: Stand, drivers: Sequence[Driver], floor: Floor, lead: str | None = None
) -> list[Running] | SkipRecord:
    """Send each call to every column before the next call.

    Args:
        drivers: in the order in which they are asked first; for the next call it is reversed.
        lead: the column whose answers all are given to quote, so that prompts are equal; None =
            each quotes its own.

    Raises:
        RequestError: a server does not serve at all.
    """
    started = [Running(driver, task, stand, floor.clock()) for driver in drivers]
    turn = started
    for index in range(len(task.case.turns)):
        for one in turn:
            call = task.call(one.said)
            assert call is not None
            floor.step(f"{task.id}, {call.agent}, {one.column}")
            try:
                floor.rest.before()
                if one.driver.prime(call):
                    floor.rest.after()
                    floor.rest.before()
                one.ask()
            except RefusedError as error:
                return one.skip(error, [other.column for other in started], floor.clock())
            floor.rest.after()
        for one in started:
            said = next((other.texts for other in started if other.column == lead), one.texts)
            one.said = said[: index + 1]
        floor.heard(started)
        # there and back again: whoever was first comes last
        turn = turn[::-1]
    return started


def run_task(
    task: Task,
    stand: Stand,
    drivers: Sequence[Driver],
    floor: Floor,
    *,
    side_by_side: bool = True,
) -> list[Record]:
    """Play a task on all columns, for its records.

    Args:
        side_by_side: a call goes to every column before the next call does; else a column is done
            with the task before the next one begins.

    Returns its records, in the order in which they came about; a skip alone if a server refused.

    Raises:
        RequestError: a server does not serve at all.
    """
    done: list[Running] = []
    order: list[CallRecord] = []
    for group in [drivers] if side_by_side else [[driver] for driver in drivers]:
        played = play(task, stand, group, floor)
        if isinstance(played, SkipRecord):
            return [replace(played, columns=[driver.column.name for driver in drivers])]
        for index in range(len(task.case.turns)):
            order += [one.records[index] for one in (played if index % 2 == 0 else played[::-1])]
        done += played
    return [*order, *(one.result() for one in done)]
