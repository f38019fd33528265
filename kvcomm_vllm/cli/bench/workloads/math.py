# SPDX-License-Identifier: Apache-2.0
"""Word problems (GSM8K) through a fully connected team, whose referee states the number."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from kvcomm_vllm.cli.bench.scoring import exact_number, stated_number
from kvcomm_vllm.cli.bench.task import Task, TaskSet, Workload
from kvcomm_vllm.cli.bench.workloads.script import MOST_AGENTS, check, task_of, task_set
from kvcomm_vllm.cli.fidelity.source import DataSet
from kvcomm_vllm.cli.fidelity.workloads import gsm8k
from kvcomm_vllm.cli.fidelity.workloads.chain import Role
from kvcomm_vllm.cli.rows import Row

DATA = DataSet(
    gsm8k.DATA.file,
    {"question": str, "answer": str},
    gsm8k.DATA.sample,
    {"question": str, "answer": str},
)
ALONE: Role = (
    "Solver",
    "You are the Solver of a team. Work out the answer to the question step by step, one line for "
    "each step.",
    "Solve the question.",
)
TEAMS: dict[int, tuple[Role, ...]] = {
    2: (ALONE, gsm8k.EDITOR),
    3: (gsm8k.ANALYST, gsm8k.SOLVER, gsm8k.INSPECTOR),
    4: (gsm8k.ANALYST, gsm8k.SOLVER, gsm8k.CHECKER, gsm8k.EDITOR),
    5: (gsm8k.ANALYST, gsm8k.PLANNER, gsm8k.SOLVER, gsm8k.CHECKER, gsm8k.EDITOR),
}


def make(
    folder: Path | None = None, seed: int = 0, agents: int = 5, output_tokens: int = 256
) -> TaskSet:
    """
    Args:
        agents: 2 to 5, the referee among them.
        output_tokens: longest answer of each.

    Raises:
        DataError: an option out of its range; unusable data.
    """
    check("agents", agents, 2, MOST_AGENTS)
    team = TEAMS[agents]
    names = [name for name, _, _ in team]

    def task(row: Row) -> Task:
        (case,) = gsm8k.solve(row, team)
        score = partial(exact_number, right=stated_number(row["answer"], case.id))
        return task_of(case, names, output_tokens, score)

    return task_set(DATA, folder, seed, output_tokens, task)


WORKLOAD = Workload(
    name="math",
    title="A team solves word problems; each reads all before it, the last one states the number",
    make=make,
    calls=5,
    metric="exact number",
    options=("agents", "output_tokens"),
)
