# SPDX-License-Identifier: Apache-2.0
"""Times to the first token and from end to end: percentiles, sums, ratios to the baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from kvcomm_vllm.evaluation.bench.columns import NO_CACHE, PLAIN
from kvcomm_vllm.evaluation.bench.records import CallRecord
from kvcomm_vllm.evaluation.report.intervals import Interval, ratio_of_sums
from kvcomm_vllm.evaluation.report.pairs import (
    Pair,
    calls_of,
    pair_calls,
    pair_tasks,
    tasks_of,
    unit,
)
from kvcomm_vllm.evaluation.report.read import Run

BASELINES = (PLAIN, NO_CACHE)


@dataclass(frozen=True)
class Cut:
    """Some of a column's calls, by their times to first token in ms.

    Args:
        ratios: by baseline, the baseline's sum over this column's, on the same calls: how many
            times sooner the first tokens came. Missing for the baseline itself.
    """

    calls: int
    p50: float
    p90: float
    p99: float
    total_s: float
    ratios: dict[str, Interval]


@dataclass(frozen=True)
class Latency:
    """A column on one workload (or on all of them) in phase lockstep.

    Args:
        every: all calls, warm-up and declined ones included; the other cuts are None where they
            are empty. ``reusing`` calls took KV of another request, ``rest`` did not; both are
            None where the server does not count that.
        floor: this column's sum over that of the same prompts' exact full hits.
        full_hit_ms: median of these full hits.
        agents: median in ms by agent, in the order of speaking.
        seconds: median of a task's end-to-end seconds; ``seconds_ratios`` as ``ratios`` of a cut.
        slower: share of calls that took at least 10% longer than the same call on ``plain``.
        waited_s: seconds after answers in which the server learned while idle; in no other time.
    """

    workload: str
    column: str
    every: Cut
    warmed: Cut | None
    warmup: Cut | None
    reusing: Cut | None
    rest: Cut | None
    floor: Interval | None
    full_hit_ms: float | None
    agents: dict[str, float]
    tasks: int
    seconds: float
    seconds_ratios: dict[str, Interval]
    slower: float | None
    waited_s: float


SLOWER = 1.1


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 90th and 99th percentile, between neighbours by linear interpolation."""
    p50, p90, p99 = np.percentile(times, (50, 90, 99))
    return float(p50), float(p90), float(p99)


def latency(run: Run, workload: str, column: str) -> Latency | None:
    """None without a call."""
    calls = calls_of(run, workload, column)
    if not calls:
        return None
    others = {name: calls_of(run, workload, name) for name in BASELINES if name != column}
    counted = any(call.reused is not None for call in calls)

    def cut(chosen: Callable[[CallRecord], bool], known: bool = True) -> Cut | None:
        found = [call for call in calls if chosen(call)]
        return _cut(found, others) if found and known else None

    every = _cut(calls, others)
    hits = pair_calls(calls, [c for c in calls_of(run, workload, PLAIN) if c.full_hit_ms])
    times = [other.full_hit_ms for _, other in hits if other.full_hit_ms]
    floor = [(unit(call), call.ttft_ms, other.full_hit_ms or 0.0) for call, other in hits]
    on_plain = pair_calls(calls, others.get(PLAIN, []))
    tasks = tasks_of(run, workload, column)
    return Latency(
        workload,
        column,
        every=every,
        warmed=cut(lambda call: not call.warmup),
        warmup=cut(lambda call: call.warmup),
        reusing=cut(lambda call: bool(call.reused), counted),
        rest=cut(lambda call: not call.reused, counted),
        floor=ratio_of_sums(floor),
        full_hit_ms=median(times) if times else None,
        agents=_agents(calls),
        tasks=len(tasks),
        seconds=median(task.seconds for task in tasks),
        seconds_ratios={name: r for name in others if (r := _seconds(run, workload, column, name))},
        slower=_slower(on_plain),
        waited_s=sum(call.waited_ms for call in calls) / 1e3,
    )


def _cut(calls: list[CallRecord], baselines: dict[str, list[CallRecord]]) -> Cut:
    times = [call.ttft_ms for call in calls]
    pairs = {name: pair_calls(calls, found) for name, found in baselines.items()}
    ratios = {name: speedup(found) for name, found in pairs.items()}
    known = {name: ratio for name, ratio in ratios.items() if ratio}
    return Cut(len(calls), *percentiles(times), sum(times) / 1e3, known)


def speedup(pairs: list[Pair]) -> Interval | None:
    """Sum of the second calls' times to first token over the first calls' sum."""
    return ratio_of_sums((unit(call), other.ttft_ms, call.ttft_ms) for call, other in pairs)


def _seconds(run: Run, workload: str, column: str, baseline: str) -> Interval | None:
    pairs = pair_tasks(tasks_of(run, workload, column), tasks_of(run, workload, baseline))
    return ratio_of_sums((unit(task), other.seconds, task.seconds) for task, other in pairs)


def _slower(pairs: list[Pair]) -> float | None:
    if not pairs:
        return None
    return sum(call.ttft_ms >= SLOWER * other.ttft_ms for call, other in pairs) / len(pairs)


def _agents(calls: list[CallRecord]) -> dict[str, float]:
    times: dict[str, list[float]] = {}
    for call in sorted(calls, key=lambda call: call.index):
        times.setdefault(call.agent, []).append(call.ttft_ms)
    return {agent: median(found) for agent, found in times.items()}
