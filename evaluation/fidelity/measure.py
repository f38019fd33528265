# SPDX-License-Identifier: Apache-2.0
"""All points of one workload: teach so many cases, then score the last agents of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch

from kvcomm_vllm.evaluation.fidelity.bench import MESSAGE_TOKENS, Bench
from kvcomm_vllm.evaluation.fidelity.divergence import Divergence, divergence
from kvcomm_vllm.evaluation.fidelity.study import Study
from kvcomm_vllm.evaluation.modes import DENSE, asked
from kvcomm_vllm.evaluation.workloads.answers import meaning
from kvcomm_vllm.evaluation.workloads.case import Answer, Case

BATCH = 8  # cases whose answers are asked for at once
COUNTS = ("prompt_tokens", "local", "reused", "computed", "corrected")
_salts = count()


@dataclass(frozen=True, kw_only=True)
class Score(Divergence):
    """Distance to dense of one prompt under one mode with so many anchors.

    ``said`` and ``dense_said`` are what the freely running answers come down to, ``same_answer``
    whether that is equal, None where the dense answer comes down to nothing. ``local`` to
    ``corrected`` are prompt tokens; corrected ones are among the reused. ``anchor_mb``: memory of
    the anchors of all placeholders at its point.
    """

    workload: str
    mode: str
    anchors: int
    case: str
    group: str
    said: float | None
    dense_said: float | None
    same_answer: bool | None
    prompt_tokens: int
    local: int
    reused: int
    computed: int
    corrected: int
    anchor_mb: float = 0.0


@dataclass(frozen=True)
class Dense:
    """The exact answer: what every mode is measured against.

    Args:
        tokens: forced on every mode; ``steps``: log-probabilities at each of them.
        meaning: see :func:`answers.meaning`.
    """

    tokens: list[int]
    steps: list[torch.Tensor]
    meaning: float | None


@dataclass(frozen=True)
class Point:
    """A mode with so many anchors, and the salt under which it has them.

    Args:
        exact_sources: only the last agent reuses; what it reads is dense.
        idle_seconds: how long nobody asks anything, behind each agent but the last.
    """

    mode: str
    anchors: int
    salt: str
    exact_sources: bool
    idle_seconds: float = 0.0

    @property
    def hints(self) -> dict[str, Any]:
        return asked(self.mode)


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
    idle_seconds: float = 0.0,
) -> list[Score]:
    """Scores of every prompt at every point, point by point.

    Args:
        points: (mode, anchors); each has a cache of its own, hence anchors of its own.
        tokens: of the dense greedy answer, along which distributions are compared.
        done: called once for each rehearsal, lesson and prompt.
        exact_sources, idle_seconds: see :class:`Point`.
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
        dense += _dense_answers(bench, study.scored[some], tokens, salt)
    found: list[Score] = []
    for mode, anchors in points:
        # Never used before in this process: an engine that lives on would know its anchors.
        salt = f"{study.workload} {mode} {anchors} {next(_salts)}"
        point = Point(mode, anchors, salt, exact_sources, idle_seconds)
        others = bench.anchor_bytes().keys()
        for case in study.lessons[:anchors]:
            _teach(bench, case, point)
            done()
        here: list[Score] = []
        for some in batches(study.scored):
            here += _scores(bench, study.workload, study.scored[some], dense[some], point)
        held = bench.anchor_bytes().items()
        anchor_mb = sum(size for key, size in held if key not in others) / 2**20
        found += [replace(score, anchor_mb=anchor_mb) for score in here]
    return found


def _rehearsed(study: Study, points: list[tuple[str, int]]) -> list[Case]:
    """Cases whose messages are needed."""
    return [*study.scored, *study.lessons[: max(anchors for _, anchors in points)]]


def _dense_answers(bench: Bench, cases: Sequence[Case], tokens: int, salt: str) -> list[Dense]:
    """The exact greedy answers, of ``tokens``, and what they come down to at their full length."""
    prompts = [bench.script(case).prompts[-1] for case in cases]
    heard = [bench.run(one, DENSE, salt, tokens=tokens, listen=tokens) for one in prompts]
    meanings = _said(bench, cases, DENSE, salt, tokens)
    return [Dense(run.tokens, run.steps, found) for run, found in zip(heard, meanings, strict=True)]


def _said(
    bench: Bench, cases: Sequence[Case], hints: dict[str, Any], salt: str, tokens: int
) -> list[float | None]:
    """What the last agents' freely running answers come down to, see :func:`answers.meaning`.

    Asked right after they were scored: a prompt's own pages, approximate as they are, are a local
    hit.
    """
    found: dict[Case, float | None] = dict.fromkeys(cases)
    asked = [case for case in cases if case.answer is not Answer.TEXT]
    if asked:
        prompts = [bench.script(case).prompts[-1] for case in asked]
        texts = bench.answers(prompts, hints, salt, max(tokens, MESSAGE_TOKENS))
        for case, text in zip(asked, texts, strict=True):
            found[case] = meaning(case, bench.decode(text))
    return list(found.values())


def _teach(bench: Bench, case: Case, point: Point) -> None:
    """All agents speak densely, for the plugin to learn one anchor per placeholder."""
    script = bench.script(case)
    for prompt, message in zip(script.prompts, [*script.messages, []], strict=True):
        bench.run(prompt + message, {**point.hints, "learn": True}, point.salt)
    bench.settle()


def _scores(
    bench: Bench, workload: str, cases: Sequence[Case], dense: Sequence[Dense], point: Point
) -> list[Score]:
    """All cases of a batch, and what their freely running answers come down to."""
    pairs = zip(cases, dense, strict=True)
    found = [_score(bench, workload, case, exact, point) for case, exact in pairs]
    tokens = max(len(exact.tokens) for exact in dense)
    meanings = _said(bench, cases, point.hints, point.salt, tokens)
    return [
        replace(one, said=what, same_answer=what == one.dense_said)
        if one.dense_said is not None
        else replace(one, said=what)
        for one, what in zip(found, meanings, strict=True)
    ]


def _score(bench: Bench, workload: str, case: Case, dense: Dense, point: Point) -> Score:
    """The last agent's distributions, after all others have spoken under the same mode, or, with
    exact sources, densely.
    """
    script, hints, salt = bench.script(case), point.hints, point.salt
    prompt = script.prompts[-1]
    for earlier, message in zip(script.prompts, script.messages, strict=False):
        bench.run(earlier + message, DENSE if point.exact_sources else hints, salt)
        bench.rest(point.idle_seconds)
    if hints == DENSE:  # vLLM's own prefix hit, another order of the same sums: what rounding costs
        bench.run(prompt, hints, salt)
    run = bench.follow(prompt, dense.tokens, hints, salt)
    return Score(
        **vars(divergence(dense.steps, run.steps)),
        workload=workload,
        mode=point.mode,
        anchors=point.anchors,
        case=case.id,
        group=case.group,
        said=None,
        dense_said=dense.meaning,
        same_answer=None,
        **{name: int(run.report.get(name, 0)) for name in COUNTS},
    )
