# SPDX-License-Identifier: Apache-2.0
"""Whether answers behind an edit follow the text before it: all modes on each probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from kvcomm_vllm.evaluation.fidelity.bench import Bench, BenchError, Run
from kvcomm_vllm.evaluation.fidelity.divergence import divergence
from kvcomm_vllm.evaluation.fidelity.measure import COUNTS, Score
from kvcomm_vllm.evaluation.fidelity.study import Study
from kvcomm_vllm.evaluation.modes import DENSE, asked
from kvcomm_vllm.evaluation.workloads.case import Case

RIGHT, STALE = 1.0, 2.0
_salts = count()


@dataclass(frozen=True, kw_only=True)
class ProbeScore(Score):
    """``said`` and ``dense_said`` are RIGHT, STALE, or None for anything else; ``odds`` and
    ``dense_odds`` by how many nats the right answer is likelier than the stale one, both at the
    first token in which these differ; ``token`` and ``dense_token`` the ones that were said there.
    """

    form: str
    token: str
    dense_token: str
    odds: float
    dense_odds: float


@dataclass(frozen=True)
class Question:
    """What is listened to behind a prompt.

    Args:
        answer: the right answer up to the first token that is not the stale one's.
        stale: that one.
    """

    prompt: list[int]
    answer: list[int]
    stale: int


def said(steps: Sequence[torch.Tensor], answer: Sequence[int], stale: int) -> float | None:
    """What the greedy answer is: RIGHT or STALE; None where it is neither.

    Args:
        steps: log-probabilities along ``answer``, whose last token tells both apart.
    """
    best = [int(step.argmax()) for step in steps]
    if best[:-1] != list(answer[:-1]):
        return None
    return {answer[-1]: RIGHT, stale: STALE}.get(best[-1])


def measure_probes(
    bench: Bench,
    study: Study,
    points: list[tuple[str, int]],
    done: Callable[[], object] = lambda: None,
) -> list[ProbeScore]:
    """Scores of every probe under every mode.

    Args:
        points: (mode, anchors); nothing is learned, so points with anchors are left out.
        done: called once for each probe.
    """
    modes = [mode for mode, anchors in points if not anchors]
    found: list[ProbeScore] = []
    for case in study.scored:
        found += _scores(bench, study.workload, case, modes)
        done()
    return found


def question_of(bench: Bench, case: Case) -> Question:
    """The last prompt with the beginning of its answer.

    Raises:
        BenchError: one answer begins with the other, so that no token tells them apart.
    """
    probe = case.probe
    assert probe is not None
    prompt = [*bench.script(case).prompts[-1], *bench.encode(probe.lead)]
    right, stale = bench.encode(probe.right), bench.encode(probe.stale)
    for place, (one, other) in enumerate(zip(right, stale, strict=False)):
        if one != other:
            return Question(prompt, right[: place + 1], other)
    raise BenchError(f"{case.id}: {probe.right!r} and {probe.stale!r} begin alike")


def _scores(bench: Bench, workload: str, case: Case, modes: list[str]) -> Iterator[ProbeScore]:
    question, script = question_of(bench, case), bench.script(case)
    # a cache of its own: other probes' texts are no sources
    salt = f"{case.id} {next(_salts)}"
    dense = bench.follow(question.prompt, question.answer, DENSE, f"{salt} dense")
    for earlier, message in zip(script.prompts, script.messages, strict=False):
        bench.run(earlier + message, DENSE, salt)
    for mode in modes:
        run = bench.follow(question.prompt, question.answer, asked(mode), salt)
        probe = case.probe
        assert probe is not None
        exact, now = (said(one.steps, question.answer, question.stale) for one in (dense, run))
        yield ProbeScore(
            **vars(divergence(dense.steps, run.steps)),
            workload=workload,
            mode=mode,
            anchors=0,
            case=case.id,
            group=case.group,
            said=now,
            dense_said=exact,
            same_answer=None if exact is None else now == exact,
            form=probe.form,
            token=_token(bench, run),
            dense_token=_token(bench, dense),
            odds=_odds(run, question),
            dense_odds=_odds(dense, question),
            **{name: int(run.report.get(name, 0)) for name in COUNTS},
        )


def _odds(run: Run, question: Question) -> float:
    last = run.steps[-1]
    return float(last[question.answer[-1]] - last[question.stale])


def _token(bench: Bench, run: Run) -> str:
    return str(bench.tokenizer.decode([int(run.steps[-1].argmax())]))
