# SPDX-License-Identifier: Apache-2.0
"""A judge over the answers of three candidates, shown in one order and in the reverse of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from kvcomm_vllm.cli.bench.task import Task, TaskSet, Workload
from kvcomm_vllm.cli.bench.workloads.rows import chance, shuffled
from kvcomm_vllm.cli.bench.workloads.script import check, task_of
from kvcomm_vllm.cli.fidelity.answers import meaning
from kvcomm_vllm.cli.fidelity.case import Case
from kvcomm_vllm.cli.fidelity.workloads import gsm8k, judge

CANDIDATES = tuple(f"Candidate {number}" for number in range(1, len(judge.CANDIDATES) + 1))


def make(folder: Path | None = None, seed: int = 0, output_tokens: int = 128) -> TaskSet:
    """Two tasks of one group for each problem, next to each other.

    Args:
        output_tokens: longest answer of each agent.

    Raises:
        DataError: an option out of its range; unusable data.
    """
    check("output_tokens", output_tokens, 1)
    rows, source = shuffled(gsm8k.DATA, folder, seed)
    cases = [case for row in rows for case in judge.make(row, chance(row, seed))]
    return TaskSet([_task(case, output_tokens) for case in cases], source)


def _task(case: Case, output_tokens: int) -> Task:
    task = task_of(case, [*CANDIDATES, "Judge"], output_tokens)
    return replace(task, group=case.group, choice=partial(_choice, case))


def _choice(case: Case, answer: str) -> str | None:
    number = meaning(case, answer)
    return None if number is None else CANDIDATES[int(number) - 1]


WORKLOAD = Workload(
    name="judge",
    title="A judge picks the best of three answers to a word problem, in two orders",
    make=make,
    calls=4,
    options=("output_tokens",),
)
