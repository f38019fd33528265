# SPDX-License-Identifier: Apache-2.0
"""Means per mode and number of anchors, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.table import Table as Screen

from kvcomm_vllm.evaluation.report import table
from kvcomm_vllm.evaluation.report.table import Table
from kvcomm_vllm.evaluation.workloads.answers import consistency

if TYPE_CHECKING:
    from kvcomm_vllm.evaluation.fidelity.measure import Score

LEGEND = (
    "KL: of the last agent's next-token distribution from the dense one, in nats, along the dense "
    "greedy answer. same top: share of tokens that both rank first; clear: the same where dense's "
    "first is twice as likely as its second; same start: share of the answer before the first "
    "that is not. reused, corr.: shares of the prompt taken from other "
    "requests, and corrected with anchors. answer: last number, or choice, equal to dense (where "
    "dense has one). both orders: the judge chooses the same candidate in both orders (dense: in "
    "brackets)."
)


@dataclass(frozen=True)
class Summary:
    """Means over the prompts of a workload. ``reused`` to ``corrected`` are shares of the prompt,
    ``anchor_mb`` is the memory of the anchors of all placeholders;
    ``clear``, ``same_answer``, ``consistency`` and ``dense_consistency`` are None where they mean
    nothing.
    """

    workload: str
    mode: str
    anchors: int
    prompts: int
    kl1: float
    kl_mean: float
    top1: float
    clear: float | None
    prefix: float
    same_answer: float | None
    consistency: float | None
    dense_consistency: float | None
    local: float
    reused: float
    computed: float
    corrected: float
    anchor_mb: float


def summarise(scores: list[Score]) -> list[Summary]:
    """One summary per (workload, mode, anchors), in the order of first appearance."""
    points: dict[tuple[str, str, int], list[Score]] = {}
    for score in scores:
        points.setdefault((score.workload, score.mode, score.anchors), []).append(score)
    return [_summary(*key, found) for key, found in points.items()]


def _summary(workload: str, mode: str, anchors: int, scores: list[Score]) -> Summary:
    means: dict[str, Any] = {
        name: _mean(getattr(score, name) for score in scores)
        for name in ("kl1", "kl_mean", "top1", "clear", "prefix", "same_answer")
    }
    shares: dict[str, Any] = {
        name: _mean(getattr(score, name) / score.prompt_tokens for score in scores)
        for name in ("local", "reused", "computed", "corrected")
    }
    return Summary(
        workload,
        mode,
        anchors,
        prompts=len(scores),
        **means,
        consistency=consistency((s.group, s.said) for s in scores),
        dense_consistency=consistency((s.group, s.dense_said) for s in scores),
        **shares,
        anchor_mb=max(score.anchor_mb for score in scores),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def render_table(workload: str, summaries: list[Summary], tokens: int) -> Screen:
    """The table of one workload; columns without a value are left out."""
    title = f"{workload}: distance to dense, {summaries[0].prompts} prompts, {tokens} tokens each"
    answers = any(s.same_answer is not None for s in summaries)
    pairs = any(s.consistency is not None for s in summaries)

    def cells(s: Summary) -> dict[str, str]:
        orders = f"{_share(s.consistency)} ({_share(s.dense_consistency)})"
        return {
            "\nmode": s.mode,
            "an-\nchors": str(s.anchors),
            "\nreused": f"{s.reused:.0%}",
            "\ncorr.": f"{s.corrected:.0%}",
            "KL\nfirst": f"{s.kl1:.4f}",
            "KL\nmean": f"[green]{s.kl_mean:.4f}[/green]",
            "same\ntop": f"{s.top1:.1%}",
            "\nclear": _share(s.clear, 1),
            "same\nstart": f"{s.prefix:.0%}",
            **({"\nanswer": _share(s.same_answer)} if answers else {}),
            **({"both\norders": orders} if pairs else {}),
        }

    held = [f"{s.mode}, {s.anchors}: {s.anchor_mb:.0f} MB" for s in summaries if s.anchor_mb]
    caption = f"Memory of anchors: {'; '.join(held)}" if held else None
    return Table(title, LEGEND, [cells(s) for s in summaries], labels=1).screen(caption)


def _share(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def write_json(
    path: Path, settings: dict[str, Any], summaries: list[Summary], scores: list[Score]
) -> None:
    """Settings, means, and every prompt."""
    content = {"settings": settings, "summary": summaries, "prompts": scores}
    table.write_json(path, content, finite=False)
