# SPDX-License-Identifier: Apache-2.0
"""Scenes of `kvcomm demo`: what is played, on which columns, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as Screen

from kvcomm_vllm.evaluation.bench.columns import NO_CACHE, PLAIN
from kvcomm_vllm.evaluation.demo import edits, table
from kvcomm_vllm.evaluation.demo.table import Heard
from kvcomm_vllm.evaluation.workloads.edits import MIXED, session_task
from kvcomm_vllm.evaluation.workloads.notes import load_questions, notes_task
from kvcomm_vllm.evaluation.workloads.rows import DataError
from kvcomm_vllm.evaluation.workloads.task import Task


@dataclass(frozen=True)
class Scene:
    """A scene by name.

    Args:
        task: what one task is called, and a row of the table.
        columns: of plain vLLM, beside kvcomm's.
        quick, full: tasks to be timed, and tokens of an answer.
        least_answer: fewest tokens of an answer that make sense.
        tasks: so many, with answers of so many tokens, from the user's data if any.
        rows: of the table, from what was heard; ``line``: what is said of one call at once.
        picture: its title, with ``{rows}`` for their number; ``reused``: where reused text is from.
    """

    name: str
    task: str
    row: str
    columns: tuple[str, ...]
    quick: tuple[int, int]
    full: tuple[int, int]
    least_answer: int
    tasks: Callable[[int, int, Path | None], list[Task]]
    rows: Callable[[list[Heard]], list[Any]]
    line: Callable[[Heard], str]
    table: Callable[[list[Any], int, int], Screen]
    legend: str
    headline: Callable[[list[Any]], str]
    picture: str
    reused: str


def _notes(count: int, answer_tokens: int, data: Path | None) -> list[Task]:
    return [notes_task(question, answer_tokens) for question in load_questions(count, data)]


def _sessions(count: int, answer_tokens: int, data: Path | None) -> list[Task]:
    if data is not None:
        raise DataError("--data has no place beside --scene edit, whose sessions are made up")
    return [
        session_task(number, 0, "edit", MIXED, output_tokens=answer_tokens)
        for number in range(count)
    ]


AGENTS = Scene(
    name="agents",
    task="question",
    row="agent",
    columns=(PLAIN, NO_CACHE),
    quick=(1, 40),
    full=(2, 128),
    least_answer=8,
    tasks=_notes,
    rows=table.agent_rows,
    line=table.at_once,
    table=table.render_table,
    legend=table.LEGEND,
    headline=table.headline,
    picture="{rows} cooperating agents, every agent reads all earlier notes",
    reused="reused from another agent",
)
EDIT = Scene(
    name="edit",
    task="session",
    row="edit",
    columns=(PLAIN,),
    quick=(1, 8),
    full=(3, 8),
    least_answer=1,
    tasks=_sessions,
    rows=edits.edit_rows,
    line=edits.at_once,
    table=edits.render_table,
    legend=edits.LEGEND,
    headline=edits.headline,
    picture="One agent, whose prompt is edited near its head from turn to turn",
    reused="reused from an earlier prompt",
)
SCENES = {scene.name: scene for scene in (AGENTS, EDIT)}


def scene_of(name: str) -> Scene:
    """A scene by its name.

    Raises:
        DataError: no such scene.
    """
    if name not in SCENES:
        raise DataError(f"{name!r} is no scene; there are {', '.join(SCENES)}")
    return SCENES[name]
