# SPDX-License-Identifier: Apache-2.0
"""Small programming tasks: plan, write, test, review; hidden tests are run on the final code.

A data file ``coding_tasks.jsonl`` has ``task`` (what the agents read) and ``tests`` (pieces of
Python they never see) in each line. A test may be a whole program: the tests of HumanEval fit in as
one piece, ``test`` with a call of ``check`` behind it, and then the score is pass@1.
"""

from __future__ import annotations

from functools import partial
from random import Random

from kvcomm_vllm.evaluation.workloads.case import Case, chain
from kvcomm_vllm.evaluation.workloads.data_set import DataSet
from kvcomm_vllm.evaluation.workloads.rows import DataError, Row
from kvcomm_vllm.evaluation.workloads.scoring import share_passed
from kvcomm_vllm.evaluation.workloads.task import Task, Workload
from kvcomm_vllm.evaluation.workloads.teams import roles

DATA = DataSet("coding_tasks.jsonl", {"task": str, "tests": list}, "coding_tasks.jsonl")


def _tasks(row: Row, rng: Random, output_tokens: int = 384) -> list[Task]:
    name, tests = str(row["id"]), row["tests"]
    if not tests or not all(isinstance(test, str) for test in tests):
        raise DataError(f"{name}: needs tests, each a piece of Python")
    case = Case(name, chain("Task", row["task"], roles("coding").values()), group=name)
    return [Task(case, output_tokens, partial(share_passed, tests=tests))]


WORKLOAD = Workload(
    name="coding",
    title="A team plans, writes, tests, and reviews a small Python function",
    tasks=_tasks,
    data=DATA,
    metric="share of hidden tests passed",
)
