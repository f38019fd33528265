# SPDX-License-Identifier: Apache-2.0
"""Tables of times: to the first token, from end to end, under load, over a stream."""

from __future__ import annotations

from kvcomm_vllm.evaluation.bench.columns import NO_CACHE, PLAIN
from kvcomm_vllm.evaluation.report.content import Content
from kvcomm_vllm.evaluation.report.intervals import Interval
from kvcomm_vllm.evaluation.report.latency import Cut
from kvcomm_vllm.evaluation.report.numbers import count, fixed, share, times
from kvcomm_vllm.evaluation.report.pairs import ALL
from kvcomm_vllm.evaluation.report.table import Table, name

TIMES = ["calls", "p50 ms", "p90 ms", "p99 ms", "sum s"]
VS = ["vs plain [95%]", "vs no cache [95%]"]
CUTS = {
    "warmed": "after warm-up",
    "warmup": "warm-up",
    "reusing": "reusing",
    "rest": "not reusing",
}


def times_table(content: Content) -> Table:
    rows = []
    for row in content.latency:
        against, uncached = _versus(row.every.ratios)
        times_of = _times(row.every)
        floor = [times(row.floor), count(row.full_hit_ms)]
        rows.append([*name(row), against, *times_of, uncached, *floor])
    note = (
        "Over all calls of all agents, warm-up and declined calls included. vs: the baseline's sum "
        "over this column's, same tasks, same calls; above 1 is sooner. × full hit: this column's "
        "sum over that of exact full hits of plain's prompts, the floor."
    )
    head = ["workload", "column", VS[0], *TIMES, VS[1], "× full hit [95%]", "full hit p50 ms"]
    return Table("ttft", "Time to first token", note, head, rows)


def cuts_table(content: Content) -> Table:
    cuts = [
        (row, label, cut)
        for row in content.latency
        for attribute, label in CUTS.items()
        if (cut := getattr(row, attribute)) is not None
    ]
    rows = [[*name(row), label, *_times(cut), *_versus(cut.ratios)] for row, label, cut in cuts]
    note = "The same times apart; a call reuses when it took KV of another request."
    head = ["workload", "column", "which calls", *TIMES, *VS]
    return Table("cuts", "Time to first token, apart", note, head, rows, labels=3)


def agents_table(content: Content, workload: str) -> Table:
    found = [row for row in content.latency if row.workload == workload]
    agents = dict.fromkeys(agent for row in found for agent in row.agents)
    rows = [[agent, *(count(row.agents.get(agent)) for row in found)] for agent in agents]
    return Table(
        f"agents-{workload}",
        f"Median time to first token by agent: {workload}",
        "Milliseconds, agents in the order of speaking.",
        ["agent", *(row.column for row in found)],
        rows,
        labels=1,
    )


def seconds_table(content: Content) -> Table:
    rows = [
        [*name(row), count(row.tasks), fixed(row.seconds, 2), *_versus(row.seconds_ratios)]
        for row in content.latency
        if row.workload != ALL
    ]
    note = "A task's calls, one after the other, from sending to the last token; median."
    head = ["workload", "column", "tasks", "s per task", *VS]
    return Table("seconds", "End to end", note, head, rows)


def load_table(content: Content) -> Table:
    rows = [
        [
            *name(row),
            count(row.tasks),
            fixed(row.arrivals_per_s, 2),
            fixed(row.tasks_per_s, 2),
            fixed(row.tokens_per_s, 1),
            *map(count, (row.p50, row.p90, row.p99)),
            fixed(row.task_p50, 1),
            fixed(row.task_p90, 1),
        ]
        for row in content.load
    ]
    note = "Tasks arrive at random moments (Poisson), whether or not others have ended."
    head = ["workload", "column", "tasks", "arriving /s", "ended /s", "output tokens /s"]
    head += ["TTFT p50 ms", "p90 ms", "p99 ms", "task p50 s", "p90 s"]
    return Table("load", "Under load", note, head, rows)


def stream_table(content: Content) -> Table:
    rows = [
        [
            *name(row),
            f"{window.first}-{window.last}",
            fixed(window.plain_ms, 0),
            fixed(window.ttft_ms, 0),
            share(window.saving),
            share(window.typical),
            fixed(window.reused, 1),
            times(row.lasting) if window is row.windows[-1] else "",
        ]
        for row in content.stream
        for window in row.windows
    ]
    note = (
        "Novel tasks one after the other, after warm-up. Sum of a task's times to first token, "
        "mean over the window; typical: the saving by medians of each of a task's calls; reused: "
        "tokens a task; last line: saving of the last window over that of the first one."
    )
    head = ["workload", "column", "tasks", "plain ms", "ms", "saved", "typical", "reused"]
    head.append("last / first [95%]")
    return Table("stream", "Over a long stream", note, head, rows, labels=3)


def _times(cut: Cut) -> list[str]:
    return [*map(count, (cut.calls, cut.p50, cut.p90, cut.p99)), fixed(cut.total_s, 2)]


def _versus(ratios: dict[str, Interval]) -> list[str]:
    return [times(ratios.get(baseline)) for baseline in (PLAIN, NO_CACHE)]
