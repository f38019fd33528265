# SPDX-License-Identifier: Apache-2.0
"""A judge over the answers of several agents, in a shuffled order and in the reverse of it."""

import random

from kvcomm_vllm.cli.fidelity.case import Answer, Case, Turn, literal
from kvcomm_vllm.cli.rows import Row

CANDIDATES = (
    "You solve word problems. Work step by step, one line for each step, and end with the result.",
    "You are a teacher. Explain to a child how this problem is solved, in three or four sentences.",
    "You are in a hurry. Give the result first, then the shortest reason you can think of.",
)
JUDGE = (
    "You are the judge of a contest. You are shown a problem and the candidates' answers to it, in "
    "no particular order. Reply with the letter of the best answer first, then one sentence on why."
)


def make(row: Row, rng: random.Random) -> list[Case]:
    """Two cases, equal but for the order of the candidates in the judge's prompt."""
    problem = f"Problem:\n{literal(row['question'])}\n\n"
    order = list(range(1, len(CANDIDATES) + 1))
    rng.shuffle(order)
    name = str(row["id"])
    return [
        _case(f"{name}, {label}", name, problem, agents)
        for label, agents in (("shuffled", order), ("reversed", order[::-1]))
    ]


def _case(case_id: str, group: str, problem: str, order: list[int]) -> Case:
    speakers = [Turn(system, problem + "Answer the problem.") for system in CANDIDATES]
    shown = "".join(
        f"Candidate {letter}:\n{{{agent}}}\n\n"
        for letter, agent in zip("ABCDEFGHIJ", order, strict=False)
    )
    judge = Turn(JUDGE, problem + shown + "Which candidate gave the best answer?")
    return Case(case_id, (*speakers, judge), group, Answer.CHOICE, tuple(order))
