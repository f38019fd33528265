# SPDX-License-Identifier: Apache-2.0
"""Prompt tokens by treatment, and how much of what was already computed was not computed again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvcomm_vllm.evaluation.bench.records import CallRecord
from kvcomm_vllm.evaluation.report.numbers import Shown, count, share, word
from kvcomm_vllm.evaluation.report.run import Run

REUSE_NOTE = (
    "Of the prompt, of what an earlier request of the column had computed, and of that without "
    "the agents' own cached prefixes. Quoting calls contain text of other requests; of these, "
    "the share that reused some of it, and all of it but for seams and one page. Exact "
    "definitions: see “How it is counted”."
)
TOKENS_NOTE = (
    "Prompt tokens, sums. local: the column's own prefix cache; reused: from other requests, "
    "corrected ones among them; repeated: an earlier request of the column had them already."
)
DECLINED_NOTE = (
    "How often the server counted a reason for reusing nothing, or not a span of the prompt."
)
PAGE_TOKENS, SEAM_TOKENS = 32, 16  # where the settings do not say


@dataclass(frozen=True)
class Allowance:
    """What calls that reuse all shared text may leave to compute, in tokens.

    Args:
        page: tokens of a KV page; a cached prefix ends with a full one.
        seam: first tokens of a run, computed on purpose.
    """

    page: int
    seam: int

    @classmethod
    def of_run(cls, run: Run) -> Allowance:
        """From the settings, as far as they say: the servers' commands, their configuration."""
        page = re.search(r"--block-size[^\d]{1,5}(\d+)", str(run.setting("servers")))
        seam = run.setting("config", "effective", "seam_tokens")
        return cls(int(page[1]) if page else PAGE_TOKENS, SEAM_TOKENS if seam is None else seam)

    def of(self, call: CallRecord) -> int:
        """By its number of runs of shared text."""
        return self.page - 1 + self.seam * (call.repeated_runs or 0)


def reuse(run: Run, workload: str, column: str) -> Iterator[dict[str, Shown]]:
    """Shares of tokens, and of calls.

    A call quotes shared text where it has more of it than a call that reuses all of it may lack.
    It reuses all where it lacks no more than that. Records hold the number of runs, not the runs,
    so one that was missed goes unnoticed if it is shorter than what all may lack together.
    """
    calls = run.calls_of(workload, column)
    if not calls:
        return
    allowed = Allowance.of_run(run)
    prompt = sum(call.prompt_tokens for call in calls)
    repeated = _sum(call.repeated_tokens for call in calls)
    counted = repeated is not None and all(call.reused is not None for call in calls)
    quoted = sum(map(_quoted, calls))
    quoting = [call for call in calls if _quoted(call) > allowed.of(call)]
    whole = [c for c in quoting if _quoted(c) - (c.reused or 0) <= allowed.of(c)]
    taken = sum(min(call.reused or 0, _quoted(call)) for call in calls)
    spared = sum(min(_spared(call), call.repeated_tokens or 0) for call in calls)

    def part(some: list[CallRecord]) -> Shown:
        return share(len(some) / len(quoting) if counted and quoting else None)

    yield {
        "of prompt": share(sum(map(_spared, calls)) / prompt if prompt else 0.0),
        "of repeated": share(spared / repeated if repeated else None),
        "of quoted": share(taken / quoted if counted and quoted else None),
        "quoting calls": count(len(quoting) if repeated is not None else None),
        "reusing some": part([call for call in quoting if call.reused]),
        "reusing all": part(whole),
    }


def treatments(run: Run, workload: str, column: str) -> Iterator[dict[str, Shown]]:
    """Sums of prompt tokens; none where the server does not count them."""
    calls = run.calls_of(workload, column)
    if calls:
        yield {
            "prompt": count(sum(call.prompt_tokens for call in calls)),
            "local": count(sum(map(_local, calls))),
            "reused": count(_sum(call.reused for call in calls)),
            "corrected": count(_sum(call.corrected for call in calls)),
            "computed": count(_sum(call.computed for call in calls)),
            "repeated": count(_sum(call.repeated_tokens for call in calls)),
        }


def declined(run: Run, workload: str, column: str) -> Iterator[dict[str, Shown]]:
    """Reasons, the most frequent one first."""
    found: Counter[str] = Counter()
    for call in run.calls_of(workload, column):
        found.update(call.declined)
    for reason, number in found.most_common():
        yield {"reason": word(reason), "times": count(number)}


def _local(call: CallRecord) -> int:
    """From the column's own prefix cache, by the plugin's or else by vLLM's count."""
    return call.cached_tokens if call.local is None else call.local


def _spared(call: CallRecord) -> int:
    return _local(call) + (call.reused or 0)


def _quoted(call: CallRecord) -> int:
    """Tokens that an earlier request had, beyond the call's own cached prefix."""
    return max(0, (call.repeated_tokens or 0) - _local(call))


def _sum(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(number for number in known if number is not None)
