# SPDX-License-Identifier: Apache-2.0
"""From cases, whose turns quote each other, to the tasks of a workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from kvcomm_vllm.cli.bench.task import Call, Steps, Task, TaskSet
from kvcomm_vllm.cli.bench.workloads.rows import shuffled
from kvcomm_vllm.cli.fidelity.case import Case, fill
from kvcomm_vllm.cli.fidelity.source import DataSet
from kvcomm_vllm.cli.rows import DataError, Row

MOST_AGENTS = 5


def task_of(
    case: Case,
    agents: Sequence[str],
    output_tokens: int,
    score: Callable[[str], float] | None = None,
    fixed: bool = False,
) -> Task:
    """The task in which the case's turns are taken one after the other; its answer is the last.

    Args:
        agents: name of who takes each turn.
        output_tokens: longest answer of each, in tokens.
    """
    return Task(case.id, partial(_play, case, agents, output_tokens, fixed), score)


def _play(case: Case, agents: Sequence[str], output_tokens: int, fixed: bool) -> Steps:
    said: list[str] = []
    for agent, turn in zip(agents, case.turns, strict=True):
        user = fill(turn.user, said)
        messages = [
            {"role": "system", "content": turn.system},
            {"role": "user", "content": user},
        ]
        said.append((yield Call(agent, messages, output_tokens, fixed)))
    return said[-1]


def task_set(
    data: DataSet,
    folder: Path | None,
    seed: int,
    output_tokens: int,
    make: Callable[[Row], Task],
) -> TaskSet:
    """A task for each row of the data, in the order that the seed decides.

    Raises:
        DataError: ``output_tokens`` out of its range; unusable data.
    """
    check("output_tokens", output_tokens, 1)
    rows, source = shuffled(data, folder, seed)
    return TaskSet([make(row) for row in rows], source)


def check(name: str, value: int, least: int, most: int | None = None) -> None:
    """
    Raises:
        DataError: an option of a workload is out of its range.
    """
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise DataError(f"{name} must be {allowed}, not {value}")
