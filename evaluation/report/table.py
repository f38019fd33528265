# SPDX-License-Identifier: Apache-2.0
"""Tables of every command: cells as they are shown, on the screen or as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table as Screen

Row = TypeVar("Row")


@dataclass(frozen=True)
class Table:
    """The first ``labels`` cells of a row are words, the others numbers.

    Args:
        note: what the numbers are, for people who see the table alone.
    """

    title: str
    note: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    labels: int = 2

    def markdown(self) -> str:
        """Numbers to the right."""
        rule = ["---"] * self.labels + ["--:"] * (len(self.head) - self.labels)
        return "\n".join(_line(cells) for cells in (self.head, rule, *self.rows))

    def screen(self, caption: str | None = None) -> Screen:
        """For a terminal of 80 columns; headings may have several lines."""
        shown = Screen(
            title=self.title,
            caption=caption,
            title_justify="left",
            caption_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            padding=0,
            pad_edge=False,
        )
        for number, heading in enumerate(self.head):
            if number < self.labels:
                shown.add_column(heading, style="bold", no_wrap=True)
            else:
                shown.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            shown.add_row(*row)
        return shown


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def named(row: Any) -> Mapping[str, str]:
    """The first two cells of a row about a column on a workload."""
    return {"workload": row.workload, "column": row.column}


def table_of(
    title: str,
    note: str,
    rows: Iterable[Row],
    cells: Callable[[Row], Mapping[str, str]],
    labels: int = 2,
) -> Table:
    """A table whose rows are mappings from the headings to the cells."""
    found: Sequence[Mapping[str, str]] = [cells(row) for row in rows]
    head = list(found[0]) if found else []
    return Table(title, note, head, [list(row.values()) for row in found], labels)


def write_json(path: Path, content: Mapping[str, Any], *, finite: bool = True) -> None:
    """The same text for the same numbers; ``finite``: refuse what JSON has no word for."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=not finite)
    path.write_text(text + "\n", encoding="utf-8")
