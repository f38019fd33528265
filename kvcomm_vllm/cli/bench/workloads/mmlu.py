# SPDX-License-Identifier: Apache-2.0
"""Questions with four choices (MMLU) through analysts and a referee, who names the letter."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from kvcomm_vllm.cli.bench.scoring import LETTERS, letter
from kvcomm_vllm.cli.bench.task import Task, TaskSet, Workload
from kvcomm_vllm.cli.bench.workloads.script import MOST_AGENTS, check, task_of, task_set
from kvcomm_vllm.cli.fidelity.case import Case
from kvcomm_vllm.cli.fidelity.source import DataSet
from kvcomm_vllm.cli.fidelity.workloads.chain import Role, chain
from kvcomm_vllm.cli.rows import DataError, Row

FIELDS: dict[str, type] = {"question": str, "choices": list, "answer": str}
DATA = DataSet("mmlu.jsonl", FIELDS, "mmlu_sample.jsonl", FIELDS)
ANALYSTS: tuple[Role, ...] = (
    (
        "Scholar",
        "You are the Scholar of a team that takes an examination. Recall what is known about the "
        "subject of the question and what follows from it.",
        "What is known about this?",
    ),
    (
        "Sceptic",
        "You are the Sceptic of a team that takes an examination. Go through the choices one by "
        "one and say what speaks against each of them.",
        "What speaks against each choice?",
    ),
    (
        "Teacher",
        "You are the Teacher of a team that takes an examination. Say which mistake a pupil would "
        "make here, and which choice that mistake leads to.",
        "Which mistake is easily made here?",
    ),
    (
        "Advocate",
        "You are the Advocate of a team that takes an examination. Plead for the choice that the "
        "others have judged too quickly.",
        "Which choice deserves a second look?",
    ),
)
REFEREE: Role = (
    "Referee",
    "You are the Referee of a team that takes an examination. Weigh what the others said and "
    "reply with the letter of the right choice.",
    "Which choice is right? Reply with its letter alone.",
)


def make(
    folder: Path | None = None, seed: int = 0, agents: int = 3, output_tokens: int = 128
) -> TaskSet:
    """
    Args:
        agents: 2 to 5, the referee among them.
        output_tokens: longest answer of each.

    Raises:
        DataError: an option out of its range; unusable data.
    """
    check("agents", agents, 2, MOST_AGENTS)
    team = (*ANALYSTS[: agents - 1], REFEREE)
    names = [name for name, _, _ in team]

    def task(row: Row) -> Task:
        name = str(row["id"])
        if len(row["choices"]) != len(LETTERS) or row["answer"] not in tuple(LETTERS):
            raise DataError(f"{name}: needs four choices, and an answer from A to D")
        choices = zip(LETTERS, row["choices"], strict=True)
        question = "\n".join([row["question"], *(f"{mark}. {text}" for mark, text in choices)])
        case = Case(name, chain("Question", question, team), group=name)
        return task_of(case, names, output_tokens, partial(letter, right=row["answer"]))

    return task_set(DATA, folder, seed, output_tokens, task)


WORKLOAD = Workload(
    name="mmlu",
    title="Analysts discuss a question with four choices, and a referee names the letter",
    make=make,
    calls=3,
    metric="letter",
    options=("agents", "output_tokens"),
)
