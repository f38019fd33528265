# SPDX-License-Identifier: Apache-2.0
"""The paper's setting for times: copy machines with long prefixes over a shared random input.

Each prompt is the agent's own prefix (the same in every task), the task's input (new in every
task), and the outputs of all earlier agents. Source: KVCOMM (arXiv 2510.12872), §4.2 and Tables 2
and 3; its lengths are the defaults.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from kvcomm_vllm.cli.bench.task import Task, TaskSet, Workload
from kvcomm_vllm.cli.bench.workloads.script import MOST_AGENTS, check, task_of
from kvcomm_vllm.cli.bench.workloads.words import random_words
from kvcomm_vllm.cli.fidelity.case import Case
from kvcomm_vllm.cli.fidelity.workloads.chain import chain

TASKS = 1_000_000
# Written around the words of a prefix, and counted with them.
INSTRUCTION = "You are copy machine number {number}. Write down again what you are given. "
INSTRUCTION_TOKENS = 16


@dataclass(frozen=True)
class Endless(Sequence[Task]):
    """So many tasks that nobody runs all, made when asked for."""

    task: Callable[[int], Task]

    def __len__(self) -> int:
        return TASKS

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...

    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        numbers = range(TASKS)[index]
        if isinstance(numbers, int):
            return self.task(numbers)
        return [self.task(number) for number in numbers]


def make(
    folder: Path | None = None,
    seed: int = 0,
    agents: int = 5,
    prefix_tokens: int = 512,
    input_tokens: int = 1024,
    output_tokens: int = 512,
) -> TaskSet:
    """
    Args:
        folder: not used, there is no data.
        agents: 1 to 5.
        prefix_tokens: length of each agent's instructions, 32 or more.
        input_tokens: length of the shared input.
        output_tokens: length of each answer, whatever the model wants to write.
            For the three, see :func:`random_words` on how near the lengths are. Not counted: the
            tokens of the model's chat template, and about 10 for each answer that is quoted.

    Raises:
        DataError: an option out of its range.
    """
    check("agents", agents, 1, MOST_AGENTS)
    check("prefix_tokens", prefix_tokens, 2 * INSTRUCTION_TOKENS)
    check("input_tokens", input_tokens, 1)
    check("output_tokens", output_tokens, 1)
    names = [f"Machine {number}" for number in range(1, agents + 1)]
    team = [
        (
            name,
            INSTRUCTION.format(number=number)
            + random_words(
                prefix_tokens - INSTRUCTION_TOKENS, random.Random(f"{seed} machine {number}")
            ),
            "Write all of this down again.",
        )
        for number, name in enumerate(names, 1)
    ]

    def task(number: int) -> Task:
        name = f"synthetic-{number}"
        text = random_words(input_tokens, random.Random(f"{seed} input {number}"))
        case = Case(name, chain("Input", text, team), group=name)
        return task_of(case, names, output_tokens, fixed=True)

    return TaskSet(Endless(task), "random words")


WORKLOAD = Workload(
    name="synthetic",
    title="Copy machines over a shared random input and each other's outputs, all lengths given",
    make=make,
    calls=5,
    options=("agents", "prefix_tokens", "input_tokens", "output_tokens"),
)
