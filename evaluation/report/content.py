# SPDX-License-Identifier: Apache-2.0
"""All that a report says, computed once; tables, plots and sentences are made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kvcomm_vllm.evaluation.bench.columns import PLAIN
from kvcomm_vllm.evaluation.bench.records import LOAD, STREAM
from kvcomm_vllm.evaluation.report.break_even import BreakEven, break_even
from kvcomm_vllm.evaluation.report.latency import Latency, latency
from kvcomm_vllm.evaluation.report.load import Load, load
from kvcomm_vllm.evaluation.report.memory import Memory, memory
from kvcomm_vllm.evaluation.report.pairs import ALL
from kvcomm_vllm.evaluation.report.quality import Quality, quality
from kvcomm_vllm.evaluation.report.read import SPOKEN_OF, Run
from kvcomm_vllm.evaluation.report.reuse import Allowance, Reuse, allowance, reuse
from kvcomm_vllm.evaluation.report.stream import Stream, stream

Part = TypeVar("Part")


@dataclass(frozen=True)
class Content:
    """A row per workload and column in each list, and for all workloads together if there are
    several.

    Args:
        main: the kvcomm column that is spoken of first; None if the run has none.
        allowance: see :mod:`reuse`.
    """

    main: str | None
    columns: list[str]
    workloads: list[str]
    latency: list[Latency]
    reuse: list[Reuse]
    quality: list[Quality]
    break_even: list[BreakEven]
    load: list[Load]
    stream: list[Stream]
    memory: list[Memory]
    allowance: Allowance

    def overall(self, parts: list[Part], column: str) -> Part | None:
        """What one of the lists says of a column over all workloads."""
        wanted = ALL if len(self.workloads) > 1 else "".join(self.workloads)
        found = (p for p in parts if vars(p)["column"] == column and vars(p)["workload"] == wanted)
        return next(found, None)


def compute(run: Run) -> Content:
    """All numbers, from the records alone."""
    workloads = run.workloads()
    rows = [*workloads, *[ALL] * (len(workloads) > 1)]

    def each(part: Callable[[Run, str, str], Part | None], names: list[str]) -> list[Part]:
        found = (part(run, workload, column) for workload in names for column in run.columns)
        return [one for one in found if one is not None]

    return Content(
        main=next((column for column in SPOKEN_OF if column in run.columns), None)
        or next((column for column in run.columns if not column.startswith(PLAIN)), None),
        columns=run.columns,
        workloads=workloads,
        latency=each(latency, rows),
        reuse=each(reuse, rows),
        quality=each(quality, rows),
        break_even=each(break_even, rows),
        load=each(load, run.workloads(LOAD)),
        stream=each(stream, run.workloads(STREAM)),
        memory=memory(run),
        allowance=allowance(run),
    )
