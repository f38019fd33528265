# SPDX-License-Identifier: Apache-2.0
"""Word problems through a chain of agents, each of which reads all before it."""

import random
from collections.abc import Sequence

from kvcomm_vllm.cli.fidelity.case import Answer, Case
from kvcomm_vllm.cli.fidelity.source import DataSet
from kvcomm_vllm.cli.fidelity.workloads.chain import Role, chain
from kvcomm_vllm.cli.rows import Row

DATA = DataSet("gsm8k.jsonl", {"question": str}, "word_problems.jsonl", {"question": str})

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


def solve(row: Row, roles: Sequence[Role]) -> list[Case]:
    """One case: the question through these roles, the last of which states the number."""
    name = str(row["id"])
    turns = chain("Question", row["question"], roles)
    return [Case(name, turns, group=name, answer=Answer.NUMBER)]


def three(row: Row, rng: random.Random) -> list[Case]:
    """Analyst, Solver, Inspector."""
    return solve(row, (ANALYST, SOLVER, INSPECTOR))


def five(row: Row, rng: random.Random) -> list[Case]:
    """Analyst, Planner, Solver, Checker, Editor."""
    return solve(row, (ANALYST, PLANNER, SOLVER, CHECKER, EDITOR))
