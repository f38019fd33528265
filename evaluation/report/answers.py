# SPDX-License-Identifier: Apache-2.0
"""Whether answers are as good as plain vLLM's, equal to them, and consistent with themselves."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from kvcomm_vllm.evaluation.bench.columns import PLAIN
from kvcomm_vllm.evaluation.report.intervals import Interval, mean_of
from kvcomm_vllm.evaluation.report.numbers import Shown, count, points, share
from kvcomm_vllm.evaluation.report.run import ALL, Run
from kvcomm_vllm.evaluation.workloads.answers import consistency, equal_leading_share

DIFFERENCE = "difference, points [95%]"
NOTE = (
    "Difference: percentage points to plain on the same tasks. Equal prompts: calls whose "
    "prompt is plain's token for token; of these, the share of equal greedy answers and of the "
    "answer before the first difference. plain_nocache shows what rounding alone does. "
    "Consistent: judges who see the same candidates in another order choose the same one."
)


def answers(run: Run, workload: str, column: str) -> Iterator[dict[str, Shown]]:
    """Scores and answers of a column beside those of plain on the same tasks and calls."""
    tasks = run.tasks_of(workload, column)
    if not tasks:
        return
    scores = [task.score for task in tasks if task.score is not None]
    # what a resample draws as a whole: the tasks of a group, else the task
    differences = [
        ((task.workload, task.group or task.task), task.score - other.score)
        for task, other in (run.tasks_against(tasks) if column != PLAIN else [])
        if task.score is not None and other.score is not None
    ]
    # only to equal prompts can equal greedy answers be expected
    starts = [
        equal_leading_share(call.answer_ids, other.answer_ids)
        for call, other in (run.against(run.calls_of(workload, column)) if column != PLAIN else [])
        if call.prompt_digest == other.prompt_digest and call.answer_ids and other.answer_ids
    ]
    orders = [(task.group, task.choice) for task in tasks if task.group and workload != ALL]
    yield {
        "scored tasks": count(len(scores)),
        "score": share(fmean(scores) if scores else None),
        DIFFERENCE: points(mean_of(differences)),
        "equal prompts": count(len(starts)),
        "equal answers": share(fmean(start == 1 for start in starts) if starts else None),
        "equal start": share(fmean(starts) if starts else None),
        "consistent": share(consistency(orders)),
    }


def worse(difference: Interval | None) -> bool:
    """Whether the whole interval of the difference to plain lies below zero."""
    return difference is not None and difference.high is not None and difference.high < 0
