# SPDX-License-Identifier: Apache-2.0
"""All tables of the bench's report, in their order; sentences are made of them, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvcomm_vllm.evaluation.bench.records import LOAD, LOCKSTEP, STREAM
from kvcomm_vllm.evaluation.report import answers, break_even, load, reuse, stream, times
from kvcomm_vllm.evaluation.report.memory import memory
from kvcomm_vllm.evaluation.report.numbers import Shown, fixed, word
from kvcomm_vllm.evaluation.report.run import ALL, Run
from kvcomm_vllm.evaluation.report.table import Table

Cells = dict[str, Shown]
Rows = Callable[[Run, str, str], Iterator[Cells]]  # of a workload, or all of them, and a column
FIRST_TOKEN, ANSWERS, PAYS = "Time to first token", "Answers", "When it pays"
LOADED, STREAMED, MEMORY = "Under load", "Over a long stream", "Memory"


@dataclass(frozen=True)
class Report:
    """A run, and its tables by title."""

    run: Run
    tables: dict[str, Table[Shown]]

    def rows(self, title: str) -> Sequence[Mapping[str, Shown]]:
        """All rows of a table, none where the run has no such table."""
        return self.tables[title].rows if title in self.tables else []

    def overall(self, title: str, column: str) -> Mapping[str, Shown] | None:
        """What a table says of a column over all workloads."""
        wanted = (self.run.everything, column)
        found = (row for row in self.rows(title) if (row["workload"], row["column"]) == wanted)
        return next(found, None)


def make_report(run: Run) -> Report:
    """From the records alone."""
    tables = [
        _each(run, FIRST_TOKEN, times.FIRST_TOKEN_NOTE, times.first_token),
        *(times.by_agent(run, workload) for workload in run.workloads()),
        _each(run, "Time to first token, apart", times.APART_NOTE, times.apart, labels=3),
        _each(run, "End to end", times.END_TO_END_NOTE, times.end_to_end, together=False),
        _each(run, ANSWERS, answers.NOTE, answers.answers),
        _each(run, "Reuse", reuse.REUSE_NOTE, reuse.reuse),
        _each(run, "Tokens by treatment", reuse.TOKENS_NOTE, reuse.treatments),
        _each(run, PAYS, break_even.NOTE, break_even.break_even),
        _each(run, LOADED, load.NOTE, load.load, LOAD, together=False),
        _each(run, STREAMED, stream.NOTE, stream.stream, STREAM, labels=3, together=False),
        memory(run),
        _each(
            run,
            "Why something was not reused",
            reuse.DECLINED_NOTE,
            reuse.declined,
            labels=3,
            together=False,
        ),
    ]
    found = Report(run, {table.title: table for table in tables if table.rows})
    glance = _at_a_glance(found)
    return Report(run, {**({glance.title: glance} if glance.rows else {}), **found.tables})


def _each(
    run: Run,
    title: str,
    note: str,
    rows: Rows,
    phase: str = LOCKSTEP,
    labels: int = 2,
    together: bool = True,
) -> Table[Shown]:
    """Rows of each workload and column; ``together``: also of all workloads, if there are more."""
    names = run.workloads(phase)
    if together and len(names) > 1:
        names = [*names, ALL]
    found = [
        {"workload": word(name), "column": word(column), **cells}
        for name in names
        for column in run.columns
        for cells in rows(run, name, column)
    ]
    return Table(title, note, found, labels)


def _at_a_glance(report: Report) -> Table[Shown]:
    """A line per column, over all workloads."""
    run, rows = report.run, []
    for column in run.columns:
        time = report.overall(FIRST_TOKEN, column)
        ends = next(times.end_to_end(run, run.everything, column), None)
        reused = report.overall("Reuse", column)
        quality = report.overall(ANSWERS, column)
        if time and ends and reused and quality:
            rows.append(
                {
                    "column": word(column),
                    "sooner [95%]": time[times.VS_PLAIN],
                    "sum s": fixed(time["sum s"].value, 1),
                    **{f"p{p} ms": time[f"p{p} ms"] for p in (50, 90, 99)},
                    "end to end [95%]": ends[times.VS_PLAIN],
                    "repeated, not computed": reused["of repeated"],
                    "score [95%]": quality[answers.DIFFERENCE],
                    "equal answers": quality["equal answers"],
                }
            )
    note = (
        f"All calls of all tasks ({', '.join(run.workloads())}), warm-up and declined calls "
        "included. Sooner: plain's sum of times to first token over this column's, same calls. "
        "Repeated: tokens that an earlier request had already, by prefix caching or by reuse. "
        "Score: points to plain. Equal answers: to prompts that equal plain's."
    )
    return Table("At a glance", note, rows, labels=1)
