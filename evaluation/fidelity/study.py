# SPDX-License-Identifier: Apache-2.0
"""Which cases of a workload are scored, and which are taught before."""

from __future__ import annotations

from dataclasses import dataclass

from kvcomm_vllm.evaluation.workloads.case import Case
from kvcomm_vllm.evaluation.workloads.rows import DataError


@dataclass(frozen=True)
class Study:
    """What is scored on one workload, and what is taught before.

    Args:
        scored, lessons: cases without a common question; lessons in the order of teaching.
        source: where both are from.
    """

    workload: str
    source: str
    scored: list[Case]
    lessons: list[Case]


def choose(
    workload: str, source: str, cases: list[Case], prompts: int, anchors: int, first: int = 0
) -> Study:
    """The cases from the ``first`` are scored and the last ones taught, so that neither number
    changes what the other chooses.

    Raises:
        DataError: not enough cases.
    """
    scored = cases[first : first + prompts]
    groups = {case.group for case in scored}
    lessons = [case for case in reversed(cases) if case.group not in groups][:anchors]
    if len(scored) < prompts or len(lessons) < anchors:
        raise DataError(
            f"{workload}: {source} has {len(cases)} cases, too few for {prompts} prompts and "
            f"{anchors} anchors with other questions: lower --prompts or --anchors"
        )
    return Study(workload, source, scored, lessons)
