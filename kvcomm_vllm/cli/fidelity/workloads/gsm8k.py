# SPDX-License-Identifier: Apache-2.0
"""Word problems through a chain of agents, each of which reads all before it."""

import random

from kvcomm_vllm.cli.fidelity.case import Answer, Case, Turn, literal
from kvcomm_vllm.cli.fidelity.source import Row

Role = tuple[str, str, str]  # name, instructions, what to do

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


def _chain(row: Row, roles: tuple[Role, ...]) -> list[Case]:
    user = f"Question:\n{literal(row['question'])}\n\n"
    turns = []
    for number, (name, system, task) in enumerate(roles, 1):
        turns.append(Turn(system, user + task))
        user += f"The {name} said:\n{{{number}}}\n\n"
    name = str(row["id"])
    return [Case(name, tuple(turns), group=name, answer=Answer.NUMBER)]


def three(row: Row, rng: random.Random) -> list[Case]:
    """Analyst, Solver, Inspector."""
    return _chain(row, (ANALYST, SOLVER, INSPECTOR))


def five(row: Row, rng: random.Random) -> list[Case]:
    """Analyst, Planner, Solver, Checker, Editor."""
    return _chain(row, (ANALYST, PLANNER, SOLVER, CHECKER, EDITOR))
