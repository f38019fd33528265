# SPDX-License-Identifier: Apache-2.0
"""Whether answers are as good as plain vLLM's, equal to them, and consistent with themselves."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from kvcomm_vllm.evaluation.bench.columns import PLAIN
from kvcomm_vllm.evaluation.report.intervals import Interval, mean_of
from kvcomm_vllm.evaluation.report.pairs import (
    ALL,
    calls_of,
    group,
    pair_calls,
    pair_tasks,
    tasks_of,
)
from kvcomm_vllm.evaluation.report.read import Run
from kvcomm_vllm.evaluation.workloads.answers import consistency, equal_leading_share


@dataclass(frozen=True)
class Quality:
    """A column on one workload (or on all of them) in phase lockstep; shares are in 0..1.

    Args:
        score: mean over scored tasks; None without any.
        difference: mean of score minus plain's score on the same tasks, with its interval.
        compared: calls whose prompt equals plain's token for token; only these can be expected to
            have the same greedy answer.
        equal_answers: share of them with the same answer.
        equal_start: mean share of the answer before the first token that differs.
        consistent: share of groups of tasks (the same candidates in another order) that ended in
            one and the same choice.
    """

    workload: str
    column: str
    scored: int
    score: float | None
    difference: Interval | None
    compared: int
    equal_answers: float | None
    equal_start: float | None
    consistent: float | None

    @property
    def worse(self) -> bool:
        """Whether the whole interval of the difference to plain lies below zero."""
        high = self.difference.high if self.difference else None
        return high is not None and high < 0


def quality(run: Run, workload: str, column: str) -> Quality | None:
    """None without a task."""
    tasks = tasks_of(run, workload, column)
    if not tasks:
        return None
    scores = [task.score for task in tasks if task.score is not None]
    differences = []
    if column != PLAIN:
        for task, other in pair_tasks(tasks, tasks_of(run, workload, PLAIN)):
            if task.score is not None and other.score is not None:
                differences.append((group(task), task.score - other.score))
    shares = [] if column == PLAIN else _equal_starts(run, workload, column)
    grouped = [(task.group, task.choice) for task in tasks if task.group]
    return Quality(
        workload,
        column,
        scored=len(scores),
        score=fmean(scores) if scores else None,
        difference=mean_of(differences),
        compared=len(shares),
        equal_answers=fmean(share == 1 for share in shares) if shares else None,
        equal_start=fmean(shares) if shares else None,
        consistent=consistency(grouped) if workload != ALL else None,
    )


def _equal_starts(run: Run, workload: str, column: str) -> list[float]:
    pairs = pair_calls(calls_of(run, workload, column), calls_of(run, workload, PLAIN))
    return [
        equal_leading_share(call.answer_ids, other.answer_ids)
        for call, other in pairs
        if call.prompt_digest == other.prompt_digest and call.answer_ids and other.answer_ids
    ]
