# SPDX-License-Identifier: Apache-2.0
"""A table as text, the same one for the page and for Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first ``labels`` cells of a row are words, the others numbers.

    Args:
        id: short name, unique in the report.
        note: what the numbers are, for people who see the table alone.
    """

    id: str
    title: str
    note: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    labels: int = 2


def name(row: object) -> list[str]:
    """The first two cells of a row about a column on a workload."""
    return [vars(row)["workload"], vars(row)["column"]]
