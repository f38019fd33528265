# SPDX-License-Identifier: Apache-2.0
"""Agents that read the same retrieved passages, each in another order, and each other's notes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random

from kvcomm_vllm.evaluation.workloads.case import Case, Turn, literal
from kvcomm_vllm.evaluation.workloads.data_set import DataSet
from kvcomm_vllm.evaluation.workloads.rows import Row
from kvcomm_vllm.evaluation.workloads.scoring import word_f1
from kvcomm_vllm.evaluation.workloads.task import Task, Workload
from kvcomm_vllm.evaluation.workloads.teams import roles

SAMPLE_PASSAGES = 4
READERS = ("Librarian", "Critic", "Long writer")
# The accepted answers are a few words long, and word F1 punishes every word around them.
TEAM = ("Librarian", "Critic", "Writer")


def consult(row: Row, rng: Random, readers: Sequence[str] = READERS) -> list[Case]:
    """Several agents; each finds the passages in an order of its own."""
    notes = ""
    turns = []
    for number, (reader, system, task) in enumerate(map(roles("rag").__getitem__, readers), 1):
        passages = rng.sample(row["passages"], len(row["passages"]))
        text = "\n\n".join(literal(str(passage)) for passage in passages)
        question = f"Question: {literal(row['question'])}"
        turns.append(Turn(system, f"Passages:\n\n{text}\n\n{question}\n\n{notes}{task}", reader))
        notes += f"The {reader} said:\n{{{number}}}\n\n"
    name = str(row["id"])
    return [Case(name, tuple(turns), group=name)]


def expand(line: Row) -> list[Row]:
    """A row per question of a packaged topic, with the passage it is about and some others.

    A question is ``[index of its passage, text, accepted answers]``.
    """
    rows = []
    for number, (about, question, answers) in enumerate(line["questions"]):
        name = f"{line['id']}-{number}"
        others = [text for index, text in enumerate(line["passages"]) if index != about]
        rng = Random(name)
        passages = [line["passages"][about], *rng.sample(others, SAMPLE_PASSAGES - 1)]
        rows.append({"id": name, "question": question, "passages": passages, "answers": answers})
    return rows


def _tasks(row: Row, rng: Random, output_tokens: int = 96) -> list[Task]:
    score = partial(word_f1, accepted=row["answers"])
    return [Task(case, output_tokens, score) for case in consult(row, rng, TEAM)]


DATA = DataSet(
    "rag_squad.jsonl",
    {"question": str, "passages": list, "answers": list},
    "passages.jsonl",
    {"questions": list, "passages": list},
    expand,
)
WORKLOAD = Workload(
    name="rag",
    title="Three agents answer a question from shared passages, each in another order",
    tasks=_tasks,
    data=DATA,
    metric="word F1",
)
