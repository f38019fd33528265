# SPDX-License-Identifier: Apache-2.0
"""Promises of the manual: its lines fit a screen, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINE = 100

LONG_LINES = {"docs/config.md", "docs/reasons.md"}
LONG_FOLDERS = ("docs/results/",)

GENERATED = re.compile(r"<!-- generated: .*?<!-- end: ", re.DOTALL)
CODE_BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def _pages() -> list[str]:
    found = [*ROOT.glob("*.md")]
    for folder in ("docs", "evaluation", "kernels", "kvcomm_vllm", "tests", "tools"):
        found += (ROOT / folder).rglob("*.md")
    return sorted({path.resolve().relative_to(ROOT).as_posix() for path in found})


PAGES = _pages()
MANUAL = [
    page
    for page in PAGES
    if (page in ("README.md", "CONTRIBUTING.md") or page.startswith("docs/"))
    and page not in LONG_LINES
    and not page.startswith(LONG_FOLDERS)
]


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _slug(heading: str) -> str:
    """The anchor GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def long_lines(text: str) -> list[str]:
    by_hand = GENERATED.sub("", text).splitlines()
    return [line for line in by_hand if len(line) > MAX_LINE and "://" not in line]


def broken_links(page: str) -> list[str]:
    """Relative links of a page to files, or headings of pages, that are not there."""
    broken = []
    for link in LINK.findall(CODE.sub("", _text(page))):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists():
            broken.append(link)
        elif anchor and target.suffix == ".md":
            headings = HEADING.findall(CODE_BLOCK.sub("", target.read_text(encoding="utf-8")))
            if anchor not in map(_slug, headings):
                broken.append(link)
    return broken


@pytest.mark.parametrize("page", MANUAL)
def test_lines_of_the_manual_have_at_most_100_characters(page: str) -> None:
    assert long_lines(_text(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files_and_headings(page: str) -> None:
    assert broken_links(page) == []


def test_long_lines_are_found_outside_generated_tables_and_without_addresses() -> None:
    long = "x" * (MAX_LINE + 1)
    table = f"<!-- generated: a -->\n{long}\n<!-- end: a -->"
    text = f"{'y' * MAX_LINE}\n{table}\nhttps://{long}\n{long}\n"
    assert long_lines(text) == [long]


def test_the_pages_are_there() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/anchors.md"} <= {*MANUAL}
