# SPDX-License-Identifier: Apache-2.0
"""All points of one workload: teach so many cases, then score the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count

from kvcomm_vllm.evaluation.fidelity.bench import Bench
from kvcomm_vllm.evaluation.fidelity.score import Dense, Score, dense_answers, scores, teach
from kvcomm_vllm.evaluation.fidelity.study import Study
from kvcomm_vllm.evaluation.modes import hints_of
from kvcomm_vllm.evaluation.workloads.case import Case

BATCH = 8  # cases whose answers are asked for at once
_salts = count()


def steps(study: Study, points: list[tuple[str, int]]) -> int:
    """How often :func:`measure` reports progress."""
    return (
        len(_rehearsed(study, points))
        + len(study.scored) * (1 + len(points))
        + sum(anchors for _, anchors in points)
    )


def measure(
    bench: Bench,
    study: Study,
    points: list[tuple[str, int]],
    tokens: int,
    done: Callable[[], object] = lambda: None,
    exact_sources: bool = False,
) -> list[Score]:
    """Scores of every prompt at every point, point by point.

    Args:
        points: (mode, anchors); each has a cache of its own, hence anchors of its own.
        tokens: of the dense greedy answer, along which distributions are compared.
        done: called once for each rehearsal, lesson and prompt.
        exact_sources: only the last agent reuses; what it reads is dense.
    """

    def batches(cases: list[Case]) -> Iterator[slice]:
        for start in range(0, len(cases), BATCH):
            yield slice(start, start + BATCH)
            for _ in cases[start : start + BATCH]:
                done()

    rehearsed = _rehearsed(study, points)
    for some in batches(rehearsed):
        bench.rehearse(rehearsed[some])
    dense: list[Dense] = []
    salt = f"dense {next(_salts)}"  # a prefix hit rounds otherwise
    for some in batches(study.scored):
        dense += dense_answers(bench, study.scored[some], tokens, salt)
    found: list[Score] = []
    for point in points:
        mode, anchors = point
        hints = hints_of(mode)
        # Never used before in this process: an engine that lives on would know its anchors.
        salt = f"{study.workload} {mode} {anchors} {next(_salts)}"
        others = bench.anchor_bytes().keys()
        for case in study.lessons[:anchors]:
            teach(bench, case, hints, salt)
            done()
        here: list[Score] = []
        for some in batches(study.scored):
            cases, exact = study.scored[some], dense[some]
            here += scores(bench, study.workload, cases, exact, point, hints, salt, exact_sources)
        held = bench.anchor_bytes().items()
        anchor_mb = sum(size for slot, size in held if slot not in others) / 2**20
        found += [replace(score, anchor_mb=anchor_mb) for score in here]
    return found


def _rehearsed(study: Study, points: list[tuple[str, int]]) -> list[Case]:
    """Cases whose messages are needed."""
    return [*study.scored, *study.lessons[: max(anchors for _, anchors in points)]]
