# SPDX-License-Identifier: Apache-2.0
"""Agents that read the same retrieved passages, each in another order, and each other's notes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from kvcomm_vllm.cli.bench.scoring import word_f1
from kvcomm_vllm.cli.bench.task import Task, TaskSet, Workload
from kvcomm_vllm.cli.bench.workloads.rows import chance
from kvcomm_vllm.cli.bench.workloads.script import task_of, task_set
from kvcomm_vllm.cli.fidelity.source import DataSet
from kvcomm_vllm.cli.fidelity.workloads import rag
from kvcomm_vllm.cli.fidelity.workloads.chain import Role
from kvcomm_vllm.cli.rows import Row

DATA = DataSet(
    rag.DATA.file,
    {"question": str, "passages": list, "answers": list},
    rag.DATA.sample,
    rag.DATA.sample_fields,
    rag.DATA.expand,
)
# The accepted answers are a few words long, and word F1 punishes every word around them.
WRITER: Role = (
    "Writer",
    "You are the Writer of a team. Answer the question with a few words from the passages, and "
    "write nothing else.",
    "Answer the question in a few words.",
)
TEAM = (*rag.READERS[:-1], WRITER)


def make(folder: Path | None = None, seed: int = 0, output_tokens: int = 96) -> TaskSet:
    """
    Args:
        output_tokens: longest answer of each agent.

    Raises:
        DataError: an option out of its range; unusable data.
    """
    names = [name for name, _, _ in TEAM]

    def task(row: Row) -> Task:
        (case,) = rag.make(row, chance(row, seed), TEAM)
        score = partial(word_f1, accepted=row["answers"])
        return task_of(case, names, output_tokens, score)

    return task_set(DATA, folder, seed, output_tokens, task)


WORKLOAD = Workload(
    name="rag",
    title="Three agents answer a question from shared passages, each in another order",
    make=make,
    calls=3,
    metric="word F1",
    options=("output_tokens",),
)
