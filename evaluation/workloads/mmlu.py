# SPDX-License-Identifier: Apache-2.0
"""Questions with four choices (MMLU) through analysts and a referee, who names the letter."""

from __future__ import annotations

from functools import partial
from random import Random

from kvcomm_vllm.evaluation.workloads.case import Case, chain
from kvcomm_vllm.evaluation.workloads.data_set import DataSet
from kvcomm_vllm.evaluation.workloads.rows import DataError, Row
from kvcomm_vllm.evaluation.workloads.scoring import LETTERS, letter
from kvcomm_vllm.evaluation.workloads.task import AGENTS, TOKENS, Task, Workload
from kvcomm_vllm.evaluation.workloads.teams import roles

FIELDS: dict[str, type] = {"question": str, "choices": list, "answer": str}
DATA = DataSet("mmlu.jsonl", FIELDS, "mmlu_sample.jsonl")


def _tasks(row: Row, rng: Random, agents: int = 3, output_tokens: int = 128) -> list[Task]:
    name = str(row["id"])
    if len(row["choices"]) != len(LETTERS) or row["answer"] not in tuple(LETTERS):
        raise DataError(f"{name}: needs four choices, and an answer from A to D")
    choices = zip(LETTERS, row["choices"], strict=True)
    question = "\n".join([row["question"], *(f"{mark}. {text}" for mark, text in choices)])
    *analysts, referee = roles("mmlu").values()
    team = (*analysts[: agents - 1], referee)
    case = Case(name, chain("Question", question, team), group=name)
    return [Task(case, output_tokens, partial(letter, right=row["answer"]))]


WORKLOAD = Workload(
    name="mmlu",
    title="Analysts discuss a question with four choices, and a referee names the letter",
    tasks=_tasks,
    data=DATA,
    metric="letter",
    options={"agents": AGENTS, "output_tokens": TOKENS},
)
