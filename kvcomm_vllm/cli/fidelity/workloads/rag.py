# SPDX-License-Identifier: Apache-2.0
"""Agents that read the same passages in different orders, and each other's notes."""

import random

from kvcomm_vllm.cli.fidelity.case import Case, Turn, literal
from kvcomm_vllm.cli.fidelity.source import Row

# system, what to do
READERS = (
    (
        "You are the Librarian of a team. Say which passages matter for a question and copy the "
        "sentences that answer it.",
        "Which passages matter, and why?",
    ),
    (
        "You are the Critic of a team. Look for what speaks against the Librarian's choice, and "
        "for what was overlooked in the other passages.",
        "What was overlooked?",
    ),
    (
        "You are the Writer of a team. Answer the question in one or two sentences, from the "
        "passages alone.",
        "Answer the question.",
    ),
)
NAMES = ("Librarian", "Critic")
SAMPLE_PASSAGES = 4


def make(row: Row, rng: random.Random) -> list[Case]:
    """Three agents; each finds the passages in an order of its own."""
    notes = ""
    turns = []
    for number, (system, task) in enumerate(READERS, 1):
        passages = rng.sample(row["passages"], len(row["passages"]))
        text = "\n\n".join(literal(str(passage)) for passage in passages)
        question = f"Question: {literal(row['question'])}"
        turns.append(Turn(system, f"Passages:\n\n{text}\n\n{question}\n\n{notes}{task}"))
        if number <= len(NAMES):
            notes += f"The {NAMES[number - 1]} said:\n{{{number}}}\n\n"
    name = str(row["id"])
    return [Case(name, tuple(turns), group=name)]


def expand(line: Row) -> list[Row]:
    """A row per question of a packaged topic, with the passage it is about and some others.

    A question is ``[index of its passage, text]``.
    """
    rows = []
    for number, (about, question) in enumerate(line["questions"]):
        name = f"{line['id']}-{number}"
        others = [text for index, text in enumerate(line["passages"]) if index != about]
        rng = random.Random(name)
        passages = [line["passages"][about], *rng.sample(others, SAMPLE_PASSAGES - 1)]
        rows.append({"id": name, "question": question, "passages": passages})
    return rows
