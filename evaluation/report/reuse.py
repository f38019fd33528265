# SPDX-License-Identifier: Apache-2.0
"""Prompt tokens by treatment, and how much of what was already computed was not computed again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from kvcomm_vllm.evaluation.bench.records import CallRecord
from kvcomm_vllm.evaluation.report.pairs import calls_of
from kvcomm_vllm.evaluation.report.read import Run

PAGE_TOKENS, SEAM_TOKENS = 32, 16  # where the settings do not say


@dataclass(frozen=True)
class Reuse:
    """A column on one workload (or on all of them) in phase lockstep; tokens are sums.

    Args:
        local: from the column's own prefix cache; where the server does not count treatments, its
            ``cached_tokens``.
        reused, computed, corrected: None where the server does not count them.
        repeated: tokens that an earlier request of the column had already; None where unknown.
        of_prompt: (local + reused) / prompt.
        of_repeated: the same over ``repeated``, call by call at most all of them.
        of_quoted: reused / (repeated - local): the column's own prefixes are left out of both.
        quoting, reusing, fully: calls that quote shared text; those of them that reused some of it;
            those that reused every run of it (see :func:`quotes` and :func:`reuses_all`).
        declined: how often the server counted a reason.
    """

    workload: str
    column: str
    calls: int
    prompt: int
    local: int
    reused: int | None
    computed: int | None
    corrected: int | None
    repeated: int | None
    of_prompt: float
    of_repeated: float | None
    of_quoted: float | None
    quoting: int | None
    reusing: int | None
    fully: int | None
    declined: dict[str, int]


@dataclass(frozen=True)
class Allowance:
    """What calls that reuse all shared text may leave to compute, in tokens.

    Args:
        page: tokens of a KV page; a cached prefix ends with a full one.
        seam: first tokens of a run, computed on purpose.
    """

    page: int = PAGE_TOKENS
    seam: int = SEAM_TOKENS

    def of(self, runs: int) -> int:
        """Of a call with so many runs of shared text."""
        return self.page - 1 + self.seam * runs


def allowance(run: Run) -> Allowance:
    """From the settings, as far as they say: the servers' commands, their configuration."""
    text, seam = str(run.settings.get("servers")), run.setting("seam_tokens")
    page = re.search(r"--block-size[^\d]{1,5}(\d+)", text)
    return Allowance(
        int(page[1]) if page else PAGE_TOKENS,
        seam if isinstance(seam, int) else SEAM_TOKENS,
    )


def local_tokens(call: CallRecord) -> int:
    """Prompt tokens from the column's own prefix cache."""
    return call.cached_tokens if call.local is None else call.local


def quoted_tokens(call: CallRecord) -> int:
    """Prompt tokens that an earlier request had, beyond the call's own cached prefix."""
    return max(0, (call.repeated_tokens or 0) - local_tokens(call))


def quotes(call: CallRecord, allowed: Allowance) -> bool:
    """Whether a call quotes shared text: more than a call that reuses all of it may lack."""
    return quoted_tokens(call) > allowed.of(call.repeated_runs or 0)


def reuses_all(call: CallRecord, allowed: Allowance) -> bool:
    """Whether a call reused every run of text that it quotes, but for seams and the rest of the
    page in which its cached prefix ends.

    Records hold the number of runs, not the runs, so one that was missed goes unnoticed if it is
    shorter than what all may lack together.
    """
    missed = quoted_tokens(call) - (call.reused or 0)
    return missed <= allowed.of(call.repeated_runs or 0)


def reuse(run: Run, workload: str, column: str) -> Reuse | None:
    """None without a call."""
    calls = calls_of(run, workload, column)
    if not calls:
        return None
    allowed = allowance(run)
    prompt = sum(call.prompt_tokens for call in calls)
    local = sum(map(local_tokens, calls))
    reused = _sum(call.reused for call in calls)
    repeated = _sum(call.repeated_tokens for call in calls)
    quoted = sum(map(quoted_tokens, calls))
    quoting = [call for call in calls if quotes(call, allowed)]
    known = repeated is not None
    counted = known and reused is not None
    return Reuse(
        workload,
        column,
        len(calls),
        prompt,
        local,
        reused,
        computed=_sum(call.computed for call in calls),
        corrected=_sum(call.corrected for call in calls),
        repeated=repeated,
        of_prompt=(local + (reused or 0)) / prompt if prompt else 0.0,
        of_repeated=sum(map(_kept, calls)) / repeated if repeated else None,
        of_quoted=sum(map(_taken, calls)) / quoted if counted and quoted else None,
        quoting=len(quoting) if known else None,
        reusing=sum(bool(call.reused) for call in quoting) if counted else None,
        fully=sum(reuses_all(call, allowed) for call in quoting) if counted else None,
        declined=dict(sum((Counter(call.declined) for call in calls), Counter())),
    )


def _kept(call: CallRecord) -> int:
    return min(local_tokens(call) + (call.reused or 0), call.repeated_tokens or 0)


def _taken(call: CallRecord) -> int:
    return min(call.reused or 0, quoted_tokens(call))


def _sum(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)
