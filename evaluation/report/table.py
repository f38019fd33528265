# SPDX-License-Identifier: Apache-2.0
"""Tables of every command: cells as they are shown, on the screen or as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table as Screen

Cell = TypeVar("Cell", bound=str)


@dataclass(frozen=True)
class Table(Generic[Cell]):
    """Rows by headings, the same ones in each; the first ``labels`` cells are words.

    Args:
        note: what the numbers are, for people who see the table alone.
    """

    title: str
    note: str
    rows: Sequence[Mapping[str, Cell]]
    labels: int = 2

    @property
    def head(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []

    def markdown(self) -> str:
        """Numbers to the right."""
        return markdown(self.head, [list(row.values()) for row in self.rows], self.labels)

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
            shown.add_row(*row.values())
        return shown


def markdown(head: list[str], rows: list[list[str]], labels: int) -> str:
    """A table; the first ``labels`` cells are words, the others to the right."""
    rule = ["---"] * labels + ["--:"] * (len(head) - labels)
    return "\n".join(_line(cells) for cells in (head, rule, *rows))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def write_json(path: Path, content: Mapping[str, Any], *, finite: bool = True) -> None:
    """The same text for the same numbers, cells as their values; ``finite``: refuse what JSON has
    no word for.
    """
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=not finite)
    path.write_text(text + "\n", encoding="utf-8")


def _plain(content: Any) -> Any:
    content = getattr(content, "value", content) if isinstance(content, str) else content
    if is_dataclass(content) and not isinstance(content, type):
        return asdict(content)
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return content
