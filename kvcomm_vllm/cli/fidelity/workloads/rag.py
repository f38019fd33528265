# SPDX-License-Identifier: Apache-2.0
"""Agents that read the same passages in different orders, and each other's notes."""

import random
from collections.abc import Sequence

from kvcomm_vllm.cli.fidelity.case import Case, Turn, literal
from kvcomm_vllm.cli.fidelity.source import DataSet
from kvcomm_vllm.cli.fidelity.workloads.chain import Role
from kvcomm_vllm.cli.rows import Row

READERS: tuple[Role, ...] = (
    (
        "Librarian",
        "You are the Librarian of a team. Say which passages matter for a question and copy the "
        "sentences that answer it.",
        "Which passages matter, and why?",
    ),
    (
        "Critic",
        "You are the Critic of a team. Look for what speaks against the Librarian's choice, and "
        "for what was overlooked in the other passages.",
        "What was overlooked?",
    ),
    (
        "Writer",
        "You are the Writer of a team. Answer the question in one or two sentences, from the "
        "passages alone.",
        "Answer the question.",
    ),
)
SAMPLE_PASSAGES = 4


def make(row: Row, rng: random.Random, readers: Sequence[Role] = READERS) -> list[Case]:
    """Several agents; each finds the passages in an order of its own."""
    notes = ""
    turns = []
    for number, (reader, system, task) in enumerate(readers, 1):
        passages = rng.sample(row["passages"], len(row["passages"]))
        text = "\n\n".join(literal(str(passage)) for passage in passages)
        question = f"Question: {literal(row['question'])}"
        turns.append(Turn(system, f"Passages:\n\n{text}\n\n{question}\n\n{notes}{task}"))
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
        rng = random.Random(name)
        passages = [line["passages"][about], *rng.sample(others, SAMPLE_PASSAGES - 1)]
        rows.append({"id": name, "question": question, "passages": passages, "answers": answers})
    return rows


DATA = DataSet(
    "rag_squad.jsonl",
    {"question": str, "passages": list},
    "passages.jsonl",
    {"questions": list, "passages": list},
    expand,
)
