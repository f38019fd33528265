# SPDX-License-Identifier: Apache-2.0
"""All points of one workload: teach so many cases, then score the others."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from kvcomm_vllm.cli.fidelity.bench import Bench
from kvcomm_vllm.cli.fidelity.modes import hints_of
from kvcomm_vllm.cli.fidelity.score import Score, dense_answer, score, teach
from kvcomm_vllm.cli.fidelity.study import Study

_salts = count()


def steps(study: Study, points: list[tuple[str, int]]) -> int:
    """How often :func:`measure` reports progress."""
    return len(study.scored) * (1 + len(points)) + sum(anchors for _, anchors in points)


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
        done: called after each lesson and each prompt.
        exact_sources: only the last agent reuses; what it reads is dense.
    """
    dense = []
    for case in study.scored:
        dense.append(dense_answer(bench, case, tokens))
        done()
    scores = []
    for point in points:
        mode, anchors = point
        hints = hints_of(mode)
        # Never used before in this process: an engine that lives on would know its anchors.
        salt = f"{study.workload} {mode} {anchors} {next(_salts)}"
        for case in study.lessons[:anchors]:
            teach(bench, case, hints, salt)
            done()
        for case, exact in zip(study.scored, dense, strict=True):
            scores.append(
                score(bench, study.workload, case, exact, point, hints, salt, exact_sources)
            )
            done()
    return scores
