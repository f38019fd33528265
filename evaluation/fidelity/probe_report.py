# SPDX-License-Identifier: Apache-2.0
"""Probes by kind and mode: how many answers are right, stale, or something else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from kvcomm_vllm.evaluation.fidelity.probes import RIGHT, STALE, ProbeScore
from kvcomm_vllm.evaluation.report import table
from kvcomm_vllm.evaluation.report.intervals import Interval, mean_of
from kvcomm_vllm.evaluation.report.numbers import NONE, Shown, count, fixed, points, share, word
from kvcomm_vllm.evaluation.report.table import Table

ALL = "all"
DENSE_ROW = "dense"
LONG = ("probes", "other", "median", "p95", "same top")  # columns for a page alone
LEGEND = (
    "right, stale: share of the answers that say what holds after the edit, and what held before "
    "it; other: anything else. stale - dense: percentage points of stale answers more than dense "
    "has on the same probes, with a 95% interval (paired bootstrap over probes). KL: of the "
    "answer's first token from the dense one, in nats. same top: both rank the same token first. "
    "computed: share of the prompt's tokens."
)


@dataclass(frozen=True)
class ProbeSummary:
    """Shares of the answers, and distances to dense; of dense itself the former alone.

    Args:
        excess: share of stale answers less dense's.
        computed: share of the prompts' tokens.
    """

    kind: str
    mode: str
    probes: int
    right: float
    stale: float
    other: float
    excess: Interval | None = None
    kl_mean: float | None = None
    kl_median: float | None = None
    kl_p95: float | None = None
    top1: float | None = None
    computed: float | None = None


def summarise_probes(scores: Sequence[ProbeScore]) -> list[ProbeSummary]:
    """By kind, then dense and the modes in the order in which they were measured; then all kinds
    together, where there are several.
    """
    kinds = list(dict.fromkeys(score.workload for score in scores))
    found = [
        one for kind in kinds for one in _kind(kind, [s for s in scores if s.workload == kind])
    ]
    return found + (_kind(ALL, scores) if len(kinds) > 1 else [])


def _kind(kind: str, scores: Sequence[ProbeScore]) -> list[ProbeSummary]:
    modes = list(dict.fromkeys(score.mode for score in scores))
    by_mode = [[score for score in scores if score.mode == mode] for mode in modes]
    widest = max(by_mode, key=len)
    dense = ProbeSummary(kind, DENSE_ROW, len(widest), *_shares([s.dense_said for s in widest]))
    return [dense, *(_mode(kind, some) for some in by_mode)]


def _mode(kind: str, scores: Sequence[ProbeScore]) -> ProbeSummary:
    kl = [score.kl1 for score in scores]
    pairs = [(s.case, float(s.said == STALE) - float(s.dense_said == STALE)) for s in scores]
    prompt = sum(score.prompt_tokens for score in scores)
    return ProbeSummary(
        kind,
        scores[0].mode,
        len(scores),
        *_shares([score.said for score in scores]),
        excess=mean_of(pairs),
        kl_mean=fmean(kl),
        kl_median=median(kl),
        kl_p95=float(np.percentile(kl, 95)),
        top1=fmean(score.top1 for score in scores),
        computed=sum(score.computed for score in scores) / prompt,
    )


def _shares(said: Sequence[float | None]) -> tuple[float, float, float]:
    """Of right ones, stale ones and others."""
    right, stale = (said.count(what) for what in (RIGHT, STALE))
    total = len(said)
    return right / total, stale / total, (total - right - stale) / total


def probe_table(summaries: Sequence[ProbeSummary], brief: bool = False) -> Table[Shown]:
    """The table of a run; ``brief``: in eighty columns."""
    rows = [_cells(one) for one in summaries]
    if brief:
        rows = [{key: row[key] for key in row if key not in LONG} for row in rows]
    return Table("Answers behind an edit", LEGEND, rows, labels=2)


def _cells(one: ProbeSummary) -> dict[str, Shown]:
    return {
        "kind": word(one.kind.removeprefix("stale-")),
        "mode": word(one.mode),
        "probes": count(one.probes),
        "right": share(one.right),
        "stale": share(one.stale),
        "other": share(one.other),
        "stale - dense": points(one.excess) if one.mode != DENSE_ROW else Shown(NONE),
        "KL mean": fixed(one.kl_mean, 4),
        "median": fixed(one.kl_median, 4),
        "p95": fixed(one.kl_p95, 3),
        "same top": share(one.top1),
        "computed": share(one.computed),
    }


def write_probes(
    folder: Path, name: str, settings: dict[str, Any], scores: Sequence[ProbeScore]
) -> None:
    """``name``.json with all numbers, those of probes by column, and ``name``.md with the table."""
    summaries = summarise_probes(scores)
    columns = {
        field.name: json.dumps(
            [getattr(score, field.name) for score in scores], separators=(",", ":")
        )
        for field in fields(ProbeScore)
    }
    content = {"settings": settings, "summary": summaries, "prompts": columns}
    table.write_json(folder / f"{name}.json", content, finite=False)
    lines = (f"* {key}: {value}" for key, value in settings.items())
    shown = probe_table(summaries)
    blocks = ["# Answers behind an edit", "\n".join(lines), shown.markdown(), shown.note]
    (folder / f"{name}.md").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
