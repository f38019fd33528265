# SPDX-License-Identifier: Apache-2.0
"""Word problems (GSM8K) through a fully connected team, whose referee states the number."""

from __future__ import annotations

from functools import partial
from random import Random

from kvcomm_vllm.evaluation.workloads.case import Answer, Case, Role, chain
from kvcomm_vllm.evaluation.workloads.data_set import DataSet
from kvcomm_vllm.evaluation.workloads.rows import Row
from kvcomm_vllm.evaluation.workloads.scoring import exact_number, stated_number
from kvcomm_vllm.evaluation.workloads.task import AGENTS, TOKENS, Task, Workload, of_rows

DATA = DataSet("gsm8k.jsonl", {"question": str, "answer": str}, "word_problems.jsonl")
ANALYST: Role = (
    "Analyst",
    "You are the Analyst of a team. Name the quantities in the question and how they depend on "
    "each other.",
    "List the quantities.",
)
PLANNER: Role = (
    "Planner",
    "You are the Planner of a team. From the Analyst's notes, write down in which order the "
    "numbers have to be worked out, without doing the arithmetic.",
    "Write the plan.",
)
SOLVER: Role = (
    "Solver",
    "You are the Solver of a team. Use the Analyst's notes to work out the answer step by step.",
    "Solve the question.",
)
CHECKER: Role = (
    "Checker",
    "You are the Checker of a team. Assume that the Solver made a slip, look for it line by line, "
    "and say what you found.",
    "Check the solution.",
)
INSPECTOR: Role = (
    "Inspector",
    "You are the Inspector of a team. Check the Solver's work and state the final answer as a "
    "number.",
    "What is the final answer?",
)
EDITOR: Role = (
    "Editor",
    "You are the Editor of a team. Settle what the others disagree on and state the final answer "
    "as a number.",
    "What is the final answer?",
)
ALONE: Role = (
    "Solver",
    "You are the Solver of a team. Work out the answer to the question step by step, one line for "
    "each step.",
    "Solve the question.",
)
TEAMS: dict[int, tuple[Role, ...]] = {
    2: (ALONE, EDITOR),
    3: (ANALYST, SOLVER, INSPECTOR),
    4: (ANALYST, SOLVER, CHECKER, EDITOR),
    5: (ANALYST, PLANNER, SOLVER, CHECKER, EDITOR),
}


def solve(row: Row, rng: Random, agents: int = 5) -> list[Case]:
    """One case: the question through a team, the last of which states the number."""
    name = str(row["id"])
    turns = chain("Question", row["question"], TEAMS[agents])
    return [Case(name, turns, group=name, answer=Answer.NUMBER)]


def _tasks(row: Row, rng: Random, agents: int = 5, output_tokens: int = 256) -> list[Task]:
    (case,) = solve(row, rng, agents)
    right = stated_number(row["answer"], case.id)
    return [Task(case, output_tokens, partial(exact_number, right=right))]


WORKLOAD = Workload(
    name="math",
    title="A team solves word problems; each reads all before it, the last one states the number",
    build=of_rows(DATA, _tasks),
    metric="exact number",
    options={"agents": AGENTS, "output_tokens": TOKENS},
)
