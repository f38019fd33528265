# SPDX-License-Identifier: Apache-2.0
"""Word problems for the demo: a small set of our own, or a GSM8K-style JSONL file."""

from dataclasses import dataclass
from pathlib import Path

from kvcomm_vllm.cli.rows import DataError, Row, read_file, read_sample

EXAMPLES_CHARACTERS = 2400


@dataclass(frozen=True)
class Question:
    """A task that all agents receive word for word."""

    id: str
    task: str
    answer: str


def _worked_examples(rows: list[Row]) -> tuple[str, int]:
    """Solved problems from the front of `rows` up to a fixed length, and how many were taken."""
    texts: list[str] = []
    for row in rows:
        if sum(map(len, texts)) >= EXAMPLES_CHARACTERS:
            break
        texts.append(f"Problem: {row['question']}\nSolution: {row.get('answer', '')}")
    return "\n\n".join(texts), len(texts)


def _questions(rows: list[Row], count: int, source: str) -> list[Question]:
    questions: list[Question] = []
    cursor = 0
    while len(questions) < count:
        if cursor >= len(rows):
            raise DataError(f"{source}: enough for {len(questions)} questions, {count} are needed")
        row = rows[cursor]
        cursor += 1
        context = row.get("context")
        if not context:
            # Rows are used once only: examples that come back in a later question would be
            # reused from there, and the table would flatter the first agent.
            examples, used = _worked_examples(rows[cursor:])
            cursor += used
            context = f"Solved problems of the same kind:\n\n{examples}"
        task = f"Question: {row['question']}\n\n{context}"
        questions.append(Question(str(row["id"]), task, str(row.get("answer", ""))))
    return questions


def load_questions(count: int, data: Path | None = None) -> list[Question]:
    """The first `count` questions of a file, each with its own shared material.

    Args:
        count: number of questions.
        data: JSONL with "question" and optionally "id", "answer", and "context" per line. A row
            without context is given solved problems from the rows after it. None = the packaged
            file, whose rows come with a task sheet each.
    Errors: DataError if the file is unreadable, malformed, or too short.
    """
    fields: dict[str, type] = {"question": str}
    rows = read_file(data, fields) if data else read_sample("questions.jsonl", fields)
    return _questions(rows, count, str(data) if data else "the packaged questions")
