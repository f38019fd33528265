# SPDX-License-Identifier: Apache-2.0
"""Word problems for the demo: a small set of our own, or a GSM8K-style JSONL file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcomm_vllm.cli.agents import DATA

EXAMPLES_CHARACTERS = 2400


class DataError(ValueError):
    """The question file cannot be used; the message says why and where."""


@dataclass(frozen=True)
class Question:
    """A task that all agents receive word for word."""

    id: str
    task: str
    answer: str


def _rows(text: str, source: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise DataError(f'{source}, line {number}: needs an object with a text "question"')
        rows.append({"id": f"row-{number}", "answer": "", **row})
    return rows


def _worked_examples(rows: list[dict[str, Any]]) -> tuple[str, int]:
    """Solved problems from the front of `rows` up to a fixed length, and how many were taken."""
    texts: list[str] = []
    for row in rows:
        if sum(map(len, texts)) >= EXAMPLES_CHARACTERS:
            break
        texts.append(f"Problem: {row['question']}\nSolution: {row['answer']}")
    return "\n\n".join(texts), len(texts)


def _questions(rows: list[dict[str, Any]], count: int, source: str) -> list[Question]:
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
        questions.append(Question(str(row["id"]), task, str(row["answer"])))
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
    source = str(data) if data else "the packaged questions"
    try:
        text = (data or DATA / "questions.jsonl").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: cannot be read ({error})") from error
    return _questions(_rows(text, source), count, source)
