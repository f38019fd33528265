# SPDX-License-Identifier: Apache-2.0
"""A judge over the answers of four candidates, shown in their own order and shuffled."""

from __future__ import annotations

from functools import partial
from random import Random

from kvcomm_vllm.evaluation.workloads.answers import meaning
from kvcomm_vllm.evaluation.workloads.case import Answer, Case, Turn, literal
from kvcomm_vllm.evaluation.workloads.math import DATA
from kvcomm_vllm.evaluation.workloads.rows import Row
from kvcomm_vllm.evaluation.workloads.task import Task, Workload
from kvcomm_vllm.evaluation.workloads.teams import roles

ASKED = "Which candidate gave the best answer? Reply with its letter alone."
CANDIDATES = tuple(f"Candidate {number}" for number in (1, 2, 3, 4))


def compete(row: Row, rng: Random) -> list[Case]:
    """Two cases, equal but for the order of the candidates in the judge's prompt."""
    problem = f"Problem:\n{literal(row['question'])}\n\n"
    order = list(range(1, len(CANDIDATES) + 1))
    shuffled = order
    while shuffled == order:
        shuffled = rng.sample(order, len(order))
    name = str(row["id"])
    return [
        _case(f"{name}, {label}", name, problem, agents)
        for label, agents in (("fixed", order), ("shuffled", shuffled))
    ]


def _case(case_id: str, group: str, problem: str, order: list[int]) -> Case:
    speakers = [
        Turn(roles("judge")[name][1], problem + "Answer the problem.", name) for name in CANDIDATES
    ]
    shown = "".join(
        f"Candidate {letter}:\n{{{agent}}}\n\n"
        for letter, agent in zip("ABCDEFGHIJ", order, strict=False)
    )
    name, system, _ = roles("judge")["Judge"]
    judge = Turn(system, problem + shown + ASKED, name)
    return Case(case_id, (*speakers, judge), group, Answer.CHOICE, tuple(order))


def _tasks(row: Row, rng: Random, output_tokens: int = 128) -> list[Task]:
    """Two tasks of one group, next to each other."""
    cases = compete(row, rng)
    return [Task(case, output_tokens, choice=partial(_choice, case)) for case in cases]


def _choice(case: Case, answer: str) -> str | None:
    number = meaning(case, answer)
    return None if number is None else CANDIDATES[int(number) - 1]


WORKLOAD = Workload(
    name="judge",
    title="A judge picks the best of four answers to a word problem, in two orders",
    tasks=_tasks,
    data=DATA,
)
