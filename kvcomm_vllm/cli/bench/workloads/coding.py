# SPDX-License-Identifier: Apache-2.0
"""Small programming tasks: plan, write, test, review; hidden tests are run on the final code.

A data file ``coding_tasks.jsonl`` has ``task`` (what the agents read) and ``tests`` (pieces of
Python they never see) in each line. A test may be a whole program: the tests of HumanEval fit in as
one piece, ``test`` with a call of ``check`` behind it, and then the score is pass@1.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from kvcomm_vllm.cli.bench.scoring import share_passed
from kvcomm_vllm.cli.bench.task import Task, TaskSet, Workload
from kvcomm_vllm.cli.bench.workloads.script import task_of, task_set
from kvcomm_vllm.cli.fidelity.case import Case
from kvcomm_vllm.cli.fidelity.source import DataSet
from kvcomm_vllm.cli.fidelity.workloads.chain import Role, chain
from kvcomm_vllm.cli.rows import DataError, Row

FIELDS: dict[str, type] = {"task": str, "tests": list}
DATA = DataSet("coding_tasks.jsonl", FIELDS, "coding_tasks.jsonl", FIELDS)
TEAM: tuple[Role, ...] = (
    (
        "Planner",
        "You are the Planner of a team of Python programmers. Say in a few sentences how the "
        "function is to work and which special cases there are. Write no code.",
        "How is the function to work?",
    ),
    (
        "Programmer",
        "You are the Programmer of a team. Write the function in Python, in one code block that "
        "begins with ```python, without an example of its use.",
        "Write the function.",
    ),
    (
        "Tester",
        "You are the Tester of a team of Python programmers. Follow the code by hand on three "
        "inputs, one of them a special case, and say where it goes wrong.",
        "Where does the code go wrong?",
    ),
    (
        "Reviewer",
        "You are the Reviewer of a team of Python programmers. Correct what the Tester found and "
        "give the whole function, in one code block that begins with ```python.",
        "Give the final code.",
    ),
)


def make(folder: Path | None = None, seed: int = 0, output_tokens: int = 384) -> TaskSet:
    """
    Args:
        output_tokens: longest answer of each agent.

    Raises:
        DataError: an option out of its range; unusable data.
    """
    names = [name for name, _, _ in TEAM]

    def task(row: Row) -> Task:
        name, tests = str(row["id"]), row["tests"]
        if not tests or not all(isinstance(test, str) for test in tests):
            raise DataError(f"{name}: needs tests, each a piece of Python")
        case = Case(name, chain("Task", row["task"], TEAM), group=name)
        return task_of(case, names, output_tokens, partial(share_passed, tests=tests))

    return task_set(DATA, folder, seed, output_tokens, task)


WORKLOAD = Workload(
    name="coding",
    title="A team plans, writes, tests, and reviews a small Python function",
    make=make,
    calls=4,
    metric="share of hidden tests passed",
    options=("output_tokens",),
)
