# SPDX-License-Identifier: Apache-2.0
"""Scene ``edit``: what each edit of one agent's prompt costs, as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

from rich.table import Table as Screen

from kvcomm_vllm.evaluation.demo.table import Heard, count
from kvcomm_vllm.evaluation.report.numbers import sooner
from kvcomm_vllm.evaluation.report.table import Table
from kvcomm_vllm.evaluation.workloads.edits import FIRST

LEGEND = """\
computed: prompt tokens that were computed, by plain vLLM behind the prefix it has cached and by
kvcomm behind and between what it reuses. same first: the first token of kvcomm's greedy answer is
plain vLLM's. Both are given the same prompts, which quote what kvcomm has answered."""


@dataclass(frozen=True)
class EditRow:
    """One edit, medians over the sessions; times in milliseconds.

    `computed_kvcomm` is None where the server does not count it. `same_first` is the share of
    sessions in which the first token agrees.
    """

    edit: str
    prompt_tokens: float
    computed_plain: float
    computed_kvcomm: float | None
    ttft_cached_ms: float
    ttft_kvcomm_ms: float
    same_first: float

    @property
    def label(self) -> str:
        return self.edit

    @property
    def speedup_cached(self) -> float:
        return self.ttft_cached_ms / self.ttft_kvcomm_ms


def _same_first(call: Heard) -> bool:
    return call.kvcomm.answer_ids[:1] == call.cached.answer_ids[:1]


def _row(edit: str, calls: list[Heard]) -> EditRow:
    def mid(value: Callable[[Heard], float]) -> float:
        return median(map(value, calls))

    computed = [n for call in calls if (n := call.kvcomm.computed) is not None]
    return EditRow(
        edit=edit,
        prompt_tokens=mid(lambda call: call.kvcomm.prompt_tokens),
        computed_plain=mid(lambda call: call.cached.prompt_tokens - call.cached.cached_tokens),
        computed_kvcomm=median(computed) if len(computed) == len(calls) else None,
        ttft_cached_ms=mid(lambda call: call.cached.ttft_ms),
        ttft_kvcomm_ms=mid(lambda call: call.kvcomm.ttft_ms),
        same_first=fmean(map(_same_first, calls)),
    )


def edit_rows(calls: list[Heard]) -> list[EditRow]:
    """The first prompt and one row per edit, in their order."""
    by_edit: dict[str, list[Heard]] = {}
    for call in calls:
        by_edit.setdefault(call.agent, []).append(call)
    return [_row(edit, found) for edit, found in by_edit.items()]


def all_edits(rows: list[EditRow]) -> EditRow:
    """The sum over the edits, without the first prompt."""
    edits = [row for row in rows if row.edit != FIRST]
    computed = [n for row in edits if (n := row.computed_kvcomm) is not None]
    return EditRow(
        edit=f"all {len(edits)} edits",
        prompt_tokens=sum(row.prompt_tokens for row in edits),
        computed_plain=sum(row.computed_plain for row in edits),
        computed_kvcomm=sum(computed) if len(computed) == len(edits) else None,
        ttft_cached_ms=sum(row.ttft_cached_ms for row in edits),
        ttft_kvcomm_ms=sum(row.ttft_kvcomm_ms for row in edits),
        same_first=fmean(row.same_first for row in edits),
    )


def at_once(call: Heard) -> str:
    """A line for one call, as soon as it has been answered."""
    ours, plain = call.kvcomm, call.cached
    computed = "" if ours.computed is None else f", {ours.computed:,} computed"
    return (
        f"  {call.agent:<21} {ours.prompt_tokens:>5,} tokens{computed}: first token after "
        f"{ours.ttft_ms:,.0f} ms, {plain.ttft_ms:,.0f} with prefix caching"
    )


def render_table(rows: list[EditRow], sessions: int, answer_tokens: int) -> Screen:
    """The table that the demo prints; its last line is the sum."""
    title = (
        f"Time to first token (TTFT) in ms, median of {sessions} session(s), "
        f"answers of {answer_tokens} tokens"
    )
    cells = [
        {
            "\nprompt": row.edit,
            "\ntokens": count(row.prompt_tokens),
            "computed\nplain": count(row.computed_plain),
            "computed\nkvcomm": f"[green]{count(row.computed_kvcomm)}[/green]",
            "TTFT\nplain": count(row.ttft_cached_ms),
            "TTFT\nkvcomm": f"[green]{row.ttft_kvcomm_ms:,.0f}[/green]",
            "vs\nplain": f"[green]{row.speedup_cached:.1f}x[/green]",
            "same\nfirst": f"{row.same_first:.0%}",
        }
        for row in (*rows, all_edits(rows))
    ]
    return Table(title, LEGEND, cells, labels=1).screen()


def headline(rows: list[EditRow]) -> str:
    """One sentence on what the user of one long session gains."""
    edits = [row for row in rows if row.edit != FIRST]
    total = all_edits(rows)
    plain, kvcomm = total.ttft_cached_ms / 1e3, total.ttft_kvcomm_ms / 1e3
    said = (
        f"Waiting for the first tokens after all {len(edits)} edits took {kvcomm:.1f} s instead of "
        f"{plain:.1f} s with prefix caching ({sooner(total.speedup_cached)})"
    )
    shares = [
        row.computed_kvcomm / row.prompt_tokens for row in edits if row.computed_kvcomm is not None
    ]
    if len(shares) < len(edits):
        return f"{said}."
    exact = median(row.computed_plain / row.prompt_tokens for row in edits)
    share = f"{median(shares):.1%} of the prompt was computed instead of {exact:.0%}"
    return f"{said}; in the median {share}."
