# SPDX-License-Identifier: Apache-2.0
"""Questions with four choices (MMLU) through analysts and a referee, who names the letter."""

from __future__ import annotations

from functools import partial
from random import Random

from kvcomm_vllm.evaluation.workloads.case import Case, Role, chain
from kvcomm_vllm.evaluation.workloads.data_set import DataSet
from kvcomm_vllm.evaluation.workloads.rows import DataError, Row
from kvcomm_vllm.evaluation.workloads.scoring import LETTERS, letter
from kvcomm_vllm.evaluation.workloads.task import AGENTS, TOKENS, Task, Workload, of_rows

FIELDS: dict[str, type] = {"question": str, "choices": list, "answer": str}
DATA = DataSet("mmlu.jsonl", FIELDS, "mmlu_sample.jsonl")
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


def _tasks(row: Row, rng: Random, agents: int = 3, output_tokens: int = 128) -> list[Task]:
    name = str(row["id"])
    if len(row["choices"]) != len(LETTERS) or row["answer"] not in tuple(LETTERS):
        raise DataError(f"{name}: needs four choices, and an answer from A to D")
    choices = zip(LETTERS, row["choices"], strict=True)
    question = "\n".join([row["question"], *(f"{mark}. {text}" for mark, text in choices)])
    team = (*ANALYSTS[: agents - 1], REFEREE)
    case = Case(name, chain("Question", question, team), group=name)
    return [Task(case, output_tokens, partial(letter, right=row["answer"]))]


WORKLOAD = Workload(
    name="mmlu",
    title="Analysts discuss a question with four choices, and a referee names the letter",
    build=of_rows(DATA, _tasks),
    metric="letter",
    options={"agents": AGENTS, "output_tokens": TOKENS},
)
