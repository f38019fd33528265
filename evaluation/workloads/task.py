# SPDX-License-Identifier: Apache-2.0
"""What a workload is made of: tasks, each a case whose answer has a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from kvcomm_vllm.evaluation.workloads.case import Case, Message
from kvcomm_vllm.evaluation.workloads.data_set import DataSet, chance
from kvcomm_vllm.evaluation.workloads.rows import DataError, Row

MOST_AGENTS = 5
ENDLESS = 1_000_000
# least and greatest value of an option; None = no limit
Range = tuple[int, int | None]
AGENTS: Range = (2, MOST_AGENTS)
TOKENS: Range = (1, None)


@dataclass(frozen=True)
class Call:
    """One request of a task.

    Args:
        max_tokens: longest answer, in tokens.
        fixed: the answer has exactly ``max_tokens`` tokens, whatever the model wants.
        primers: what a server with a cache is sent before, untimed.
    """

    agent: str
    messages: list[Message]
    max_tokens: int
    fixed: bool = False
    primers: tuple[list[Message], ...] = ()


@dataclass(frozen=True)
class Task:
    """A case to be played on a server.

    Args:
        max_tokens, fixed: of every answer, see :class:`Call`.
        score: of the last answer, in 0..1; None if the workload has no score.
        choice: what was chosen, in terms that do not depend on the order in which candidates were
            shown; None if the answer names nothing.
    """

    case: Case
    max_tokens: int
    score: Callable[[str], float] | None = None
    choice: Callable[[str], str | None] | None = None
    fixed: bool = False

    @property
    def id(self) -> str:
        """Unique in its workload, the same in every run with the same seed."""
        return self.case.id

    @property
    def group(self) -> str:
        """Tasks of the same group are to end in the same choice."""
        return self.case.group if self.choice else ""

    def call(self, said: Sequence[str]) -> Call | None:
        """The next request, after these answers; None after the last."""
        if len(said) == len(self.case.turns):
            return None
        turn = self.case.turns[len(said)]
        primers = tuple(primer.messages(said) for primer in turn.primers)
        return Call(turn.agent, turn.messages(said), self.max_tokens, self.fixed, primers)


@dataclass(frozen=True)
class TaskSet:
    """The tasks of a workload, and where their data is from (a file's name, or "packaged sample").

    ``tasks`` are in an order that does not depend on how many of them are run. They may be made
    when asked for, and be very many: take a slice, not all.
    """

    tasks: Sequence[Task]
    source: str


@dataclass(frozen=True)
class Workload:
    """A workload by name.

    Args:
        title: one line for people: who talks about what.
        tasks: of a row of ``data``, as ``tasks(row, rng, **options)``; without data the task of
            random words, as ``tasks(number, seed, **options)``, of any number.
        metric: what its score is ("exact number", "F1", ...), empty without one.
        options: what ``tasks`` takes, and within which limits.
        source: what tasks without data are made of.
    """

    name: str
    title: str
    tasks: Callable[..., Any]
    data: DataSet | None = None
    options: Mapping[str, Range] = field(default_factory=lambda: {"output_tokens": TOKENS})
    metric: str = ""
    source: str = "random words"

    def make(self, folder: Path | None = None, seed: int = 0, **given: int) -> TaskSet:
        """The tasks of this workload, of data in an order that the seed decides.

        Args:
            folder: with the data; None = beside the checkout, else the packaged sample.

        Raises:
            DataError: an option out of its range; unusable data.
        """
        for name, value in given.items():
            least, most = self.options[name]
            if value < least or (most is not None and value > most):
                allowed = f"{least} or more" if most is None else f"{least} to {most}"
                raise DataError(f"{name} must be {allowed}, not {value}")
        if self.data is None:
            return TaskSet(Endless(partial(self.tasks, seed=seed, **given)), self.source)
        rows, source = self.data.shuffled(folder, seed)
        found = [self.tasks(row, chance(row, seed), **given) for row in rows]
        return TaskSet([task for some in found for task in some], source)


@dataclass(frozen=True)
class Endless(Sequence[Task]):
    """So many tasks that nobody runs all, made when asked for."""

    task: Callable[[int], Task]

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: Any) -> Any:
        numbers = range(ENDLESS)[index]
        return self.task(numbers) if isinstance(numbers, int) else [*map(self.task, numbers)]


def rng_of(seed: int, what: str) -> Random:
    """A generator of its own for each text of random words."""
    return Random(f"{seed} {what}")


MakeCases = Callable[[Row, Random], list[Case]]
