# SPDX-License-Identifier: Apache-2.0
"""Times to the first token and from end to end: percentiles, sums, ratios to the baselines."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import numpy as np

from kvcomm_vllm.evaluation.bench.columns import NO_CACHE, PLAIN
from kvcomm_vllm.evaluation.bench.records import CallRecord
from kvcomm_vllm.evaluation.report.intervals import Interval, ratio_of_sums
from kvcomm_vllm.evaluation.report.numbers import Shown, count, fixed, times, word
from kvcomm_vllm.evaluation.report.run import Pair, Run, unit
from kvcomm_vllm.evaluation.report.table import Table

Cells = dict[str, Shown]
FIRST_TOKEN_NOTE = (
    "Over all calls of all agents, warm-up and declined calls included. vs: the baseline's sum "
    "over this column's, same tasks, same calls; above 1 is sooner. × full hit: this column's "
    "sum over that of exact full hits of plain's prompts, the floor."
)
APART_NOTE = "The same times apart; a call reuses when it took KV of another request."
END_TO_END_NOTE = "A task's calls, one after the other, from sending to the last token; median."
VS_PLAIN, VS_NO_CACHE = "vs plain [95%]", "vs no cache [95%]"


def first_token(run: Run, workload: str, column: str) -> Iterator[Cells]:
    """All calls of a column, by their times to first token."""
    calls = run.calls_of(workload, column)
    if not calls:
        return
    hits = [(c, hit) for c, plain in run.against(calls) if (hit := plain.full_hit_ms)]
    ratios = versus(run, calls, column)
    yield {
        VS_PLAIN: ratios[VS_PLAIN],
        **_cut(calls),
        VS_NO_CACHE: ratios[VS_NO_CACHE],
        "× full hit [95%]": times(ratio_of_sums((unit(c), c.ttft_ms, hit) for c, hit in hits)),
        "full hit p50 ms": count(median(hit for _, hit in hits) if hits else None),
    }


def apart(run: Run, workload: str, column: str) -> Iterator[Cells]:
    """With and without warm-up; with and without reuse, where the server counts that."""
    calls = run.calls_of(workload, column)
    counted = any(call.reused is not None for call in calls)
    cuts = {
        "after warm-up": [call for call in calls if not call.warmup],
        "warm-up": [call for call in calls if call.warmup],
        "reusing": [call for call in calls if call.reused],
        "not reusing": [call for call in calls if counted and not call.reused],
    }
    for name, found in cuts.items():
        if found:
            yield {"which calls": word(name), **_cut(found), **versus(run, found, column)}


def end_to_end(run: Run, workload: str, column: str) -> Iterator[Cells]:
    """Tasks of a column, by their seconds."""
    tasks = run.tasks_of(workload, column)
    if not tasks:
        return

    def ratio(baseline: str) -> Interval | None:
        pairs = run.tasks_against(tasks, baseline) if baseline != column else []
        return ratio_of_sums((unit(task), other.seconds, task.seconds) for task, other in pairs)

    yield {
        "tasks": count(len(tasks)),
        "s per task": fixed(median(task.seconds for task in tasks), 2),
        VS_PLAIN: times(ratio(PLAIN)),
        VS_NO_CACHE: times(ratio(NO_CACHE)),
    }


def by_agent(run: Run, workload: str) -> Table[Shown]:
    """Medians of each agent, in the order of speaking, on all columns."""
    found: dict[str, dict[str, list[float]]] = {}
    for column in run.columns:
        for call in sorted(run.calls_of(workload, column), key=lambda call: call.index):
            agent = found.setdefault(call.agent, {name: [] for name in run.columns})
            agent[column].append(call.ttft_ms)
    seen = [name for name in run.columns if any(of[name] for of in found.values())]
    rows = [
        {"agent": word(agent), **{n: count(median(of[n]) if of[n] else None) for n in seen}}
        for agent, of in found.items()
    ]
    title = f"Median time to first token by agent: {workload}"
    return Table(title, "Milliseconds, agents in the order of speaking.", rows, labels=1)


def percentiles(ms: list[float]) -> Cells:
    """Between neighbours by linear interpolation."""
    return {f"p{p} ms": count(float(np.percentile(ms, p))) for p in (50, 90, 99)}


def speedup(pairs: list[Pair]) -> Interval | None:
    """How many times sooner the first calls' first tokens came: sum over sum."""
    return ratio_of_sums((unit(call), other.ttft_ms, call.ttft_ms) for call, other in pairs)


def versus(run: Run, calls: list[CallRecord], column: str) -> Cells:
    """The baselines' sums over that of these calls of a column."""
    headings = {PLAIN: VS_PLAIN, NO_CACHE: VS_NO_CACHE}
    pairs = {name: run.against(calls, name) if name != column else [] for name in headings}
    return {headings[name]: times(speedup(found)) for name, found in pairs.items()}


def _cut(calls: list[CallRecord]) -> Cells:
    ms = [call.ttft_ms for call in calls]
    return {
        "calls": count(len(calls)),
        **percentiles(ms),
        "sum s": fixed(sum(ms) / 1e3, 2),
    }
