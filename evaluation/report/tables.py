# SPDX-License-Identifier: Apache-2.0
"""All tables of the report, in their order."""

from __future__ import annotations

from kvcomm_vllm.evaluation.bench.columns import PLAIN
from kvcomm_vllm.evaluation.report.content import Content
from kvcomm_vllm.evaluation.report.numbers import count, fixed, points, share, times
from kvcomm_vllm.evaluation.report.reuse_tables import (
    break_even_table,
    declined_table,
    memory_table,
    quality_table,
    reuse_table,
    tokens_table,
)
from kvcomm_vllm.evaluation.report.table import Table
from kvcomm_vllm.evaluation.report.time_tables import (
    agents_table,
    cuts_table,
    load_table,
    seconds_table,
    stream_table,
    times_table,
)


def all_tables(content: Content) -> list[Table]:
    """Those that have a row, in the order of the report."""
    tables = [
        overview_table(content),
        times_table(content),
        *(agents_table(content, workload) for workload in content.workloads),
        cuts_table(content),
        seconds_table(content),
        quality_table(content),
        reuse_table(content),
        tokens_table(content),
        break_even_table(content),
        load_table(content),
        stream_table(content),
        memory_table(content),
        declined_table(content),
    ]
    return [table for table in tables if table.rows]


def overview_table(content: Content) -> Table:
    """A line per column, over all workloads."""
    rows = []
    for column in content.columns:
        time = content.overall(content.latency, column)
        tokens = content.overall(content.reuse, column)
        answers = content.overall(content.quality, column)
        if time is None or tokens is None or answers is None:
            continue
        every = time.every
        rows.append(
            [
                column,
                times(every.ratios.get(PLAIN)),
                fixed(every.total_s, 1),
                *map(count, (every.p50, every.p90, every.p99)),
                times(time.seconds_ratios.get(PLAIN)),
                share(tokens.of_repeated),
                points(answers.difference),
                share(answers.equal_answers),
            ]
        )
    what = ", ".join(content.workloads)
    note = (
        f"All calls of all tasks ({what}), warm-up and declined calls included. Sooner: plain's "
        "sum of times to first token over this column's, same calls. Repeated: tokens that an "
        "earlier request had already, by prefix caching or by reuse. Score: points to plain. "
        "Equal answers: to prompts that equal plain's."
    )
    head = ["column", "sooner [95%]", "sum s", "p50 ms", "p90 ms", "p99 ms", "end to end [95%]"]
    head += ["repeated, not computed", "score [95%]", "equal answers"]
    return Table("overview", "At a glance", note, head, rows, labels=1)
