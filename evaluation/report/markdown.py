# SPDX-License-Identifier: Apache-2.0
"""The report as Markdown, for a README."""

from __future__ import annotations

from collections.abc import Iterable

from kvcomm_vllm.evaluation.report.content import Content
from kvcomm_vllm.evaluation.report.definitions import definitions
from kvcomm_vllm.evaluation.report.facts import command_of, facts
from kvcomm_vllm.evaluation.report.read import Run
from kvcomm_vllm.evaluation.report.table import Table
from kvcomm_vllm.evaluation.report.tables import all_tables
from kvcomm_vllm.evaluation.report.words import alarms, cards, unknown


def markdown(content: Content, run: Run) -> str:
    """Alarms first, then sentences, conditions, tables, definitions, and what is not known."""
    blocks = [f"**{alarm}**" for alarm in alarms(content)]
    blocks.append("# kvcomm bench")
    blocks += [
        f"**{card.question} {card.number}** {' '.join(card.text)}" for card in cards(content)
    ]
    blocks.append(f"```sh\n{command_of(run)}\n```")
    blocks.append(_list(f"{name}: {value}" for name, value in facts(content, run)))
    for table in all_tables(content):
        blocks += [f"## {table.title}", table.note, markdown_table(table)]
    blocks.append("## How it is counted")
    blocks.append(_list(f"**{term}.** {text}" for term, text in definitions(content)))
    blocks += ["## Not measured", _list(unknown(content, run))]
    return "\n\n".join(blocks) + "\n"


def markdown_table(table: Table) -> str:
    """Numbers to the right."""
    rule = ["---"] * table.labels + ["--:"] * (len(table.head) - table.labels)
    return "\n".join(_row(cells) for cells in (table.head, rule, *table.rows))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)
