# SPDX-License-Identifier: Apache-2.0
"""One scored prompt: the last agent of a case, dense and under a mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcomm_vllm.evaluation.fidelity.bench import MESSAGE_TOKENS, Bench
from kvcomm_vllm.evaluation.fidelity.divergence import divergence
from kvcomm_vllm.evaluation.modes import DENSE
from kvcomm_vllm.evaluation.workloads.answers import meaning
from kvcomm_vllm.evaluation.workloads.case import Answer, Case


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
class Score:
    """Distance to dense of one prompt under one mode with so many anchors.

    ``kl1`` to ``prefix``: see :class:`divergence.Divergence`. ``said`` and ``dense_said`` are what
    the freely running answers come down to, ``same_answer`` whether that is equal, None where the
    dense answer comes down to nothing. ``local`` to ``corrected`` are prompt tokens; corrected
    ones are among the reused. ``anchor_mb``: memory of the anchors of all slots at its point.
    """

    workload: str
    mode: str
    anchors: int
    case: str
    group: str
    kl1: float
    kl_mean: float
    top1: float
    clear: float | None
    prefix: float
    said: float | None
    dense_said: float | None
    same_answer: bool | None
    prompt_tokens: int
    local: int
    reused: int
    computed: int
    corrected: int
    anchor_mb: float = 0.0


def dense_answers(bench: Bench, cases: Sequence[Case], tokens: int, salt: str) -> list[Dense]:
    """The exact greedy answers, of ``tokens``, and what they come down to at their full length."""
    heard = []
    for case in cases:
        prompt = bench.script(case).prompts[-1]
        heard.append(bench.run(prompt, DENSE, salt, tokens=tokens, listen=tokens))
    meanings = said(bench, cases, DENSE, salt, tokens)
    return [Dense(run.tokens, run.steps, found) for run, found in zip(heard, meanings, strict=True)]


def said(
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


def teach(bench: Bench, case: Case, hints: dict[str, Any], salt: str) -> None:
    """All agents speak densely, for the plugin to learn one anchor of each of their slots."""
    script = bench.script(case)
    for prompt, message in zip(script.prompts, [*script.messages, []], strict=True):
        bench.run(prompt + message, {**hints, "learn": True}, salt)
    bench.settle()


def scores(
    bench: Bench,
    workload: str,
    cases: Sequence[Case],
    dense: Sequence[Dense],
    point: tuple[str, int],
    hints: dict[str, Any],
    salt: str,
    exact_sources: bool = False,
) -> list[Score]:
    """All cases of a batch, and what their freely running answers come down to."""
    found = [
        _score(bench, workload, case, exact, point, hints, salt, exact_sources)
        for case, exact in zip(cases, dense, strict=True)
    ]
    meanings = said(bench, cases, hints, salt, max(len(exact.tokens) for exact in dense))
    return [_saying(one, what) for one, what in zip(found, meanings, strict=True)]


def _saying(score: Score, what: float | None) -> Score:
    same = None if score.dense_said is None else what == score.dense_said
    return replace(score, said=what, same_answer=same)


def _score(
    bench: Bench,
    workload: str,
    case: Case,
    dense: Dense,
    point: tuple[str, int],
    hints: dict[str, Any],
    salt: str,
    exact_sources: bool,
) -> Score:
    """The last agent's distributions, after all others have spoken under the same mode, or, with
    ``exact_sources``, densely.
    """
    script = bench.script(case)
    prompt = script.prompts[-1]
    for earlier, message in zip(script.prompts, script.messages, strict=False):
        bench.run(earlier + message, DENSE if exact_sources else hints, salt)
    if hints == DENSE:  # vLLM's own prefix hit, another order of the same sums: what rounding costs
        bench.run(prompt, hints, salt)
    count = len(dense.tokens)
    run = bench.run(prompt, hints, salt, tokens=count, force=dense.tokens, listen=count)
    distance = divergence(dense.steps, run.steps)
    counts = ("prompt_tokens", "local", "reused", "computed", "corrected")
    return Score(
        workload=workload,
        mode=point[0],
        anchors=point[1],
        case=case.id,
        group=case.group,
        kl1=distance.kl1,
        kl_mean=distance.kl_mean,
        top1=distance.top1,
        clear=distance.clear,
        prefix=distance.prefix,
        said=None,
        dense_said=dense.meaning,
        same_answer=None,
        **{name: int(run.report.get(name, 0)) for name in counts},
    )
