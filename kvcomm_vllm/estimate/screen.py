# SPDX-License-Identifier: Apache-2.0
"""The estimate on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from kvcomm_vllm.estimate import numbers
from kvcomm_vllm.estimate.numbers import ratio, share
from kvcomm_vllm.estimate.run import Run
from kvcomm_vllm.estimate.tally import Sums

AGENTS = 12


def render(run: Run) -> Iterator[RenderableType]:
    """Everything that is printed, in order."""
    yield f"[bold]{numbers.headline(run)}[/bold]"
    yield _agents(run)
    yield _losses(run)
    if run.tally.copied:
        yield _copied(run)
    if run.tally.flaws.total:
        yield _skipped(run)
    for note in numbers.notes(run):
        yield f"[dim]{escape(note)}[/dim]"


def _agents(run: Run) -> Table:
    table = Table(title="Prompt tokens", title_justify="left")
    table.add_column("agent", ratio=1)
    for heading in ("requests", "tokens", "prefix\nalone", "local", "reused", "computed", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, sums in run.tally.largest(AGENTS):
        table.add_row(escape(name), *_cells(sums))
    table.add_section()
    table.add_row("all", *_cells(run.tally.total))
    return table


def _cells(sums: Sums) -> list[str]:
    parts = (sums.prefix_alone, sums.local, sums.reused, sums.computed)
    shares = [share(part, sums.prompt_tokens) for part in parts]
    return [f"{sums.requests:,}", f"{sums.prompt_tokens:,}", *shares, ratio(sums.ratio)]


def _losses(run: Run) -> Table:
    table = Table(title="Why tokens are computed", title_justify="left")
    table.add_column("reason", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("meaning", ratio=1)
    for word, tokens, meaning in numbers.losses(run):
        table.add_row(word, f"{tokens:,}", escape(meaning))
    return table


def _copied(run: Run) -> Table:
    table = Table(title="Text that is shared but was re-encoded", title_justify="left")
    table.add_column("rendering")
    for heading in ("tokens", "places", "first\nline"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what to change", ratio=1)
    for name, copied in sorted(run.tally.copied.items(), key=lambda item: -item[1].tokens):
        counts = (copied.tokens, copied.stretches, copied.first_line)
        table.add_row(name, *(f"{count:,}" for count in counts), copied.advice)
    return table


def _skipped(run: Run) -> Padding:
    table = Table(title="Not counted", title_justify="left")
    table.add_column("kind")
    table.add_column("requests", justify="right", no_wrap=True)
    table.add_column("first line", justify="right", no_wrap=True)
    table.add_column("there", ratio=1)
    for flaw, count in run.tally.flaws.counts.items():
        numbers_ = (f"{count.number:,}", f"{count.first_line:,}")
        table.add_row(flaw.explanation, *numbers_, escape(count.detail))
    return Padding(table, 0)
