# SPDX-License-Identifier: Apache-2.0
"""All tables of the bench's report, in their order."""

from __future__ import annotations

from collections.abc import Mapping

from kvcomm_vllm.evaluation.bench.columns import NO_CACHE, PLAIN
from kvcomm_vllm.evaluation.report.break_even import Line
from kvcomm_vllm.evaluation.report.content import Content
from kvcomm_vllm.evaluation.report.intervals import Interval
from kvcomm_vllm.evaluation.report.latency import Cut, Latency
from kvcomm_vllm.evaluation.report.numbers import count, fixed, points, share, times, tokens
from kvcomm_vllm.evaluation.report.pairs import ALL
from kvcomm_vllm.evaluation.report.table import Table, named, table_of

CUTS = {
    "warmed": "after warm-up",
    "warmup": "warm-up",
    "reusing": "reusing",
    "rest": "not reusing",
}
Cells = Mapping[str, str]


def all_tables(content: Content) -> list[Table]:
    """Those that have a row, in the order of the report."""
    tables = [
        _overview(content),
        _times(content),
        *(_agents(content, workload) for workload in content.workloads),
        _cuts(content),
        _seconds(content),
        _quality(content),
        _reuse(content),
        _tokens(content),
        _break_even(content),
        _load(content),
        _stream(content),
        _memory(content),
        _declined(content),
    ]
    return [table for table in tables if table.rows]


def _overview(content: Content) -> Table:
    """A line per column, over all workloads."""

    def cells(column: str) -> Cells:
        time = content.overall(content.latency, column)
        reuse = content.overall(content.reuse, column)
        answers = content.overall(content.quality, column)
        assert time is not None
        assert reuse is not None
        assert answers is not None
        every = time.every
        return {
            "column": column,
            "sooner [95%]": times(every.ratios.get(PLAIN)),
            "sum s": fixed(every.total_s, 1),
            **_percentiles(every),
            "end to end [95%]": times(time.seconds_ratios.get(PLAIN)),
            "repeated, not computed": share(reuse.of_repeated),
            "score [95%]": points(answers.difference),
            "equal answers": share(answers.equal_answers),
        }

    parts = (content.latency, content.reuse, content.quality)
    columns = [c for c in content.columns if all(content.overall(list(p), c) for p in parts)]
    what = ", ".join(content.workloads)
    note = (
        f"All calls of all tasks ({what}), warm-up and declined calls included. Sooner: plain's "
        "sum of times to first token over this column's, same calls. Repeated: tokens that an "
        "earlier request had already, by prefix caching or by reuse. Score: points to plain. "
        "Equal answers: to prompts that equal plain's."
    )
    return table_of("At a glance", note, columns, cells, labels=1)


def _percentiles(cut: Cut) -> Cells:
    return {"p50 ms": count(cut.p50), "p90 ms": count(cut.p90), "p99 ms": count(cut.p99)}


def _cut(cut: Cut) -> Cells:
    return {"calls": count(cut.calls), **_percentiles(cut), "sum s": fixed(cut.total_s, 2)}


def _versus(ratios: dict[str, Interval]) -> dict[str, str]:
    return {
        "vs plain [95%]": times(ratios.get(PLAIN)),
        "vs no cache [95%]": times(ratios.get(NO_CACHE)),
    }


def _times(content: Content) -> Table:
    note = (
        "Over all calls of all agents, warm-up and declined calls included. vs: the baseline's sum "
        "over this column's, same tasks, same calls; above 1 is sooner. × full hit: this column's "
        "sum over that of exact full hits of plain's prompts, the floor."
    )

    def cells(row: Latency) -> Cells:
        plain, uncached = _versus(row.every.ratios).items()
        return {
            **named(row),
            **dict([plain]),
            **_cut(row.every),
            **dict([uncached]),
            "× full hit [95%]": times(row.floor),
            "full hit p50 ms": count(row.full_hit_ms),
        }

    return table_of("Time to first token", note, content.latency, cells)


def _cuts(content: Content) -> Table:
    cuts = [
        (row, label, cut)
        for row in content.latency
        for attribute, label in CUTS.items()
        if (cut := getattr(row, attribute)) is not None
    ]
    return table_of(
        "Time to first token, apart",
        "The same times apart; a call reuses when it took KV of another request.",
        cuts,
        lambda of: {**named(of[0]), "which calls": of[1], **_cut(of[2]), **_versus(of[2].ratios)},
        labels=3,
    )


def _agents(content: Content, workload: str) -> Table:
    found = [row for row in content.latency if row.workload == workload]
    agents = dict.fromkeys(agent for row in found for agent in row.agents)
    return table_of(
        f"Median time to first token by agent: {workload}",
        "Milliseconds, agents in the order of speaking.",
        agents,
        lambda agent: {"agent": agent, **{r.column: count(r.agents.get(agent)) for r in found}},
        labels=1,
    )


def _seconds(content: Content) -> Table:
    return table_of(
        "End to end",
        "A task's calls, one after the other, from sending to the last token; median.",
        [row for row in content.latency if row.workload != ALL],
        lambda row: {
            **named(row),
            "tasks": count(row.tasks),
            "s per task": fixed(row.seconds, 2),
            **_versus(row.seconds_ratios),
        },
    )


def _quality(content: Content) -> Table:
    note = (
        "Difference: percentage points to plain on the same tasks. Equal prompts: calls whose "
        "prompt is plain's token for token; of these, the share of equal greedy answers and of the "
        "answer before the first difference. plain_nocache shows what rounding alone does. "
        "Consistent: judges who see the same candidates in another order choose the same one."
    )
    return table_of(
        "Answers",
        note,
        content.quality,
        lambda row: {
            **named(row),
            "scored tasks": count(row.scored),
            "score": share(row.score),
            "difference, points [95%]": points(row.difference),
            "equal prompts": count(row.compared),
            "equal answers": share(row.equal_answers),
            "equal start": share(row.equal_start),
            "consistent": share(row.consistent),
        },
    )


def _reuse(content: Content) -> Table:
    note = (
        "Of the prompt, of what an earlier request of the column had computed, and of that without "
        "the agents' own cached prefixes. Quoting calls contain text of other requests; of these, "
        "the share that reused some of it, and all of it but for seams and one page. Exact "
        "definitions: see “How it is counted”."
    )

    def part(some: int | None, whole: int | None) -> str:
        return share(some / whole if some is not None and whole else None)

    return table_of(
        "Reuse",
        note,
        content.reuse,
        lambda row: {
            **named(row),
            "of prompt": share(row.of_prompt),
            "of repeated": share(row.of_repeated),
            "of quoted": share(row.of_quoted),
            "quoting calls": count(row.quoting),
            "reusing some": part(row.reusing, row.quoting),
            "reusing all": part(row.fully, row.quoting),
        },
    )


def _tokens(content: Content) -> Table:
    note = (
        "Prompt tokens, sums. local: the column's own prefix cache; reused: from other requests, "
        "corrected ones among them; repeated: an earlier request of the column had them already."
    )
    names = ("prompt", "local", "reused", "corrected", "computed", "repeated")
    return table_of(
        "Tokens by treatment",
        note,
        content.reuse,
        lambda row: {**named(row), **{name: count(getattr(row, name)) for name in names}},
    )


def _declined(content: Content) -> Table:
    found = [
        (row, reason, number)
        for row in content.reuse
        for reason, number in sorted(row.declined.items(), key=lambda item: -item[1])
        if row.workload != ALL
    ]
    return table_of(
        "Why something was not reused",
        "How often the server counted a reason for reusing nothing, or not a span of the prompt.",
        found,
        lambda of: {**named(of[0]), "reason": of[1], "times": count(of[2])},
        labels=3,
    )


def _break_even(content: Content) -> Table:
    note = (
        "Straight lines through the calls after warm-up: time to first token by prompt length, and "
        "time saved against plain by reused tokens. Pays from: reused tokens where the second line "
        "crosses zero (– : it does not, or cannot be told; below the fewest measured it is a "
        "guess). Ahead from call: where the sum of all times, warm-up included, stays below "
        "plain's (– : not within this run)."
    )

    def slope(line: Line | None) -> str:
        return fixed(line.slope * 1e3 if line else None, 0)

    return table_of(
        "When it pays",
        note,
        content.break_even,
        lambda row: {
            **named(row),
            "ms per 1,000 prompt tokens": slope(row.by_prompt),
            "ms saved per 1,000 reused": slope(row.saved),
            "ms saved with 0 reused": fixed(row.saved.start if row.saved else None, 1),
            "pays from, tokens [95%]": tokens(row.shared_tokens),
            "fewest reused": count(row.fewest_reused),
            "warm-up cost, s": fixed(row.warmup_cost_s, 2),
            "ahead from call": count(row.calls_until_ahead),
        },
    )


def _load(content: Content) -> Table:
    return table_of(
        "Under load",
        "Tasks arrive at random moments (Poisson), or all at once, whether or not others have "
        "ended.",
        content.load,
        lambda row: {
            **named(row),
            "tasks": count(row.tasks),
            "arriving /s": fixed(row.arrivals_per_s, 2),
            "ended /s": fixed(row.tasks_per_s, 2),
            "output tokens /s": fixed(row.tokens_per_s, 1),
            "TTFT p50 ms": count(row.p50),
            "p90 ms": count(row.p90),
            "p99 ms": count(row.p99),
            "last ms": count(row.most),
            "task p50 s": fixed(row.task_p50, 1),
            "p90 s": fixed(row.task_p90, 1),
        },
    )


def _stream(content: Content) -> Table:
    note = (
        "Novel tasks one after the other, after warm-up. Sum of a task's times to first token, "
        "mean over the window; typical: the saving by medians of each of a task's calls; reused: "
        "tokens a task; last line: saving of the last window over that of the first one."
    )
    return table_of(
        "Over a long stream",
        note,
        [(row, window) for row in content.stream for window in row.windows],
        lambda of: {
            **named(of[0]),
            "tasks": f"{of[1].first}-{of[1].last}",
            "plain ms": fixed(of[1].plain_ms, 0),
            "ms": fixed(of[1].ttft_ms, 0),
            "saved": share(of[1].saving),
            "typical": share(of[1].typical),
            "reused": fixed(of[1].reused, 1),
            "last / first [95%]": times(of[0].lasting) if of[1] is of[0].windows[-1] else "",
        },
        labels=3,
    )


def _memory(content: Content) -> Table:
    note = (
        "Per server; one may serve several columns. Resident memory of its processes: after "
        "warm-up, at the end, at most; pages: the largest share of the KV cache in use when looked "
        "at; slots with anchors, and anchors, at the end."
    )
    return table_of(
        "Memory",
        note,
        content.memory,
        lambda row: {
            "server": row.server,
            "looks": count(row.looks),
            "after warm-up MB": count(row.first_mb),
            "end MB": count(row.last_mb),
            "most MB": count(row.most_mb),
            "pages in use": share(row.most_kv),
            "slots": count(row.slots),
            "anchors": count(row.anchors),
        },
        labels=1,
    )
