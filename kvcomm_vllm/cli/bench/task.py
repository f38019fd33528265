# SPDX-License-Identifier: Apache-2.0
"""What a workload is made of: tasks, each a small program that asks agents and ends in an answer.

A task is a generator, so that whoever runs it decides what is sent where and when: one task can go
through several servers in lockstep, one call on each in turn. Nothing in here knows the plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from kvcomm_vllm.cli.client import Message


@dataclass(frozen=True)
class Call:
    """One request of a task.

    Args:
        agent: who is asked; the same agent begins every prompt with the same system message.
        max_tokens: longest answer, in tokens.
        fixed: the answer has exactly ``max_tokens`` tokens, whatever the model wants.
    """

    agent: str
    messages: list[Message]
    max_tokens: int
    fixed: bool = False


# yields calls, is sent the text of each answer, returns the task's answer
Steps = Generator[Call, str, str]


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        id: unique in its workload, the same in every run with the same seed.
        steps: starts it; may be called once for each server.
        score: of its answer, in 0..1; None if the workload has no score.
        group: tasks of the same group are to end in the same choice (a judge who is shown the same
            candidates in another order).
        choice: what was chosen, in terms that do not depend on the order; None if the answer names
            nothing.
    """

    id: str
    steps: Callable[[], Steps]
    score: Callable[[str], float] | None = None
    group: str = ""
    choice: Callable[[str], str | None] | None = None


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
        make: from a data folder (None = beside the checkout, else the packaged sample) and a seed.
        metric: what its score is ("exact number", "F1", ...), empty without one.
        calls: requests per task with the default options, at most; for progress bars.
        options: names of further keyword arguments of ``make`` (ints).
    """

    name: str
    title: str
    make: Callable[..., TaskSet]
    calls: int
    metric: str = ""
    options: tuple[str, ...] = field(default=())
