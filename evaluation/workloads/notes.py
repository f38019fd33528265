# SPDX-License-Identifier: Apache-2.0
"""Five roles with a page of instructions each work on one word problem, and leave notes.

The task and the notes are the shared text: all agents receive them word for word, at a different
position each time, because the instructions differ in length. Tasks are a small set of our own, or
a GSM8K-style JSONL file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from kvcomm_vllm.evaluation.workloads.case import Case, Turn, literal
from kvcomm_vllm.evaluation.workloads.rows import DATA, DataError, Row, read_file, read_sample
from kvcomm_vllm.evaluation.workloads.task import Task

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

    Raises:
        DataError: the file is unreadable, malformed, or too short.
    """
    fields: dict[str, type] = {"question": str}
    rows = read_file(data, fields) if data else read_sample("questions.jsonl", fields)
    return _questions(rows, count, str(data) if data else "the packaged questions")


@dataclass(frozen=True)
class Agent:
    """A role with its own system prompt."""

    name: str
    system: str


@cache
def load_agents() -> list[Agent]:
    """The five roles in the order in which they speak."""
    rows = yaml.safe_load((DATA / "agents.yaml").read_text(encoding="utf-8"))
    return [Agent(row["name"], " ".join(row["system"].split())) for row in rows]


def note_turns(task: str, agents: list[Agent]) -> tuple[Turn, ...]:
    """A turn per agent: own system prompt, the task, every earlier note, own turn."""
    user = f"Here is the task of today.\n\n{literal(task)}\n\n"
    turns = []
    for number, agent in enumerate(agents, 1):
        ask = f"It is your turn. Write your note as the {agent.name}."
        primers = (rehearsal(agent),)
        turns.append(Turn(agent.system, user + ask, agent.name, primers=primers))
        user += f"The {agent.name} has left this note for the team:\n\n{{{number}}}\n\n"
    return tuple(turns)


def rehearsal(agent: Agent) -> Turn:
    """Loads the agent's system prompt, and some shared text of no further use."""
    text = (DATA / "rehearsal.txt").read_text(encoding="utf-8")
    ask = f"It is your turn. Write your note as the {agent.name}."
    return Turn(agent.system, f"Here is the task of today.\n\n{literal(text)}\n\n{ask}")


def notes_task(question: Question, answer_tokens: int) -> Task:
    """All agents on one question; notes have exactly so many tokens.

    Before each call its agent's instructions are made the most recently used entry of the cache,
    so that evictions cannot favour a column.
    """
    turns = note_turns(question.task, load_agents())
    return Task(Case(question.id, turns, group=question.id), answer_tokens, fixed=True)
