# SPDX-License-Identifier: Apache-2.0
"""Word problems (GSM8K) through a fully connected team, whose referee states the number."""

from __future__ import annotations

from functools import partial
from random import Random

from kvcomm_vllm.evaluation.workloads.case import Answer, Case, chain
from kvcomm_vllm.evaluation.workloads.data_set import DataSet
from kvcomm_vllm.evaluation.workloads.rows import Row
from kvcomm_vllm.evaluation.workloads.scoring import exact_number, stated_number
from kvcomm_vllm.evaluation.workloads.task import AGENTS, TOKENS, Task, Workload
from kvcomm_vllm.evaluation.workloads.teams import roles

DATA = DataSet("gsm8k.jsonl", {"question": str, "answer": str}, "word_problems.jsonl")
# The last one states the number.
TEAMS = {
    2: ("Lone solver", "Editor"),
    3: ("Analyst", "Solver", "Inspector"),
    4: ("Analyst", "Solver", "Checker", "Editor"),
    5: ("Analyst", "Planner", "Solver", "Checker", "Editor"),
}


def solve(row: Row, rng: Random, agents: int = 5) -> list[Case]:
    """One case: the question through a team, the last of which states the number."""
    name = str(row["id"])
    team = [roles("math")[member] for member in TEAMS[agents]]
    turns = chain("Question", row["question"], team)
    return [Case(name, turns, group=name, answer=Answer.NUMBER)]


def chain_start(row: Row, rng: Random, agents: int) -> list[Case]:
    """One case: so many of the team of five, the last of which is free to say what it likes.

    With one of each length it can be seen whether what is lost grows along the chain.
    """
    (case,) = solve(row, rng)
    return [Case(case.id, case.turns[:agents], group=case.group)]


def _tasks(row: Row, rng: Random, agents: int = 5, output_tokens: int = 256) -> list[Task]:
    (case,) = solve(row, rng, agents)
    right = stated_number(row["answer"], case.id)
    return [Task(case, output_tokens, partial(exact_number, right=right))]


WORKLOAD = Workload(
    name="math",
    title="A team solves word problems; each reads all before it, the last one states the number",
    tasks=_tasks,
    data=DATA,
    metric="exact number",
    options={"agents": AGENTS, "output_tokens": TOKENS},
)
