# SPDX-License-Identifier: Apache-2.0
"""One scored prompt: the last agent of a case, dense and under a mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvcomm_vllm.cli.fidelity.answers import meaning
from kvcomm_vllm.cli.fidelity.bench import MESSAGE_TOKENS, Bench
from kvcomm_vllm.cli.fidelity.case import Answer, Case
from kvcomm_vllm.cli.fidelity.divergence import divergence
from kvcomm_vllm.cli.fidelity.modes import DENSE


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
    ones are among the reused.
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


def dense_answer(bench: Bench, case: Case, tokens: int) -> Dense:
    """The exact greedy answer: ``tokens`` for comparison, more where its meaning is asked for."""
    prompt = bench.script(case).prompts[-1]
    length = tokens if case.answer is Answer.TEXT else max(tokens, MESSAGE_TOKENS)
    run = bench.run(prompt, DENSE, "dense", tokens=length, listen=tokens)
    return Dense(run.tokens[:tokens], run.steps, meaning(case, bench.decode(run.tokens)))


def teach(bench: Bench, case: Case, hints: dict[str, Any], salt: str) -> None:
    """All agents speak densely, for the plugin to learn one anchor of each of their slots."""
    script = bench.script(case)
    for prompt, message in zip(script.prompts, [*script.messages, []], strict=True):
        bench.run(prompt + message, {**hints, "learn": True}, salt)
    bench.settle()


def score(
    bench: Bench,
    workload: str,
    case: Case,
    dense: Dense,
    point: tuple[str, int],
    hints: dict[str, Any],
    salt: str,
    exact_sources: bool = False,
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
    said = None
    if case.answer is not Answer.TEXT:
        # the same prompt again: its own pages, approximate as they are, are a local hit
        free = bench.run(prompt, hints, salt, tokens=max(count, MESSAGE_TOKENS))
        said = meaning(case, bench.decode(free.tokens))
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
        said=said,
        dense_said=dense.meaning,
        same_answer=None if dense.meaning is None else said == dense.meaning,
        **{name: int(run.report.get(name, 0)) for name in counts},
    )
