# SPDX-License-Identifier: Apache-2.0
"""The results of a run: JSON for whoever compares, Markdown for whoever reads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_proof.stage import Outcome

MOST_WHY = 160


def name_of(device: str) -> str:
    """A file's name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write(about: dict[str, Any], outcomes: Sequence[Outcome], folder: Path) -> Path:
    """Write ``NAME.json`` and ``NAME.md``.

    Returns:
        The latter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = name_of(str(about["device"]))
    rows = [vars(outcome) for outcome in outcomes]
    content = json.dumps({"about": about, "stages": rows}, indent=1)
    (folder / f"{name}.json").write_text(content + "\n", encoding="utf-8")
    page = folder / f"{name}.md"
    page.write_text(markdown(about, outcomes), encoding="utf-8")
    return page


def markdown(about: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    lines = [f"# {about['device']}", ""]
    lines += [f"* {key}: {value}" for key, value in about.items() if key != "device"]
    lines += ["", "| stage | | seconds | figures |", "|---|---|---|---|"]
    for outcome in outcomes:
        told = short(outcome.figures) if outcome.status != "not run" else ""
        why = " ".join(outcome.why.split())[-MOST_WHY:]
        said = "; ".join(part for part in (told, why) if part).replace("|", "/")
        status = f"**{outcome.status}**" if outcome.status == "failed" else outcome.status
        lines.append(f"| {outcome.question} | {status} | {outcome.seconds:g} | {said} |")
    return "\n".join([*lines, ""])


def short(figures: dict[str, Any]) -> str:
    """Figures in one line: all that are numbers or small groups of them."""
    parts = []
    for key, value in figures.items():
        if isinstance(value, dict) and len(value) <= 6:
            inner = ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
            parts.append(f"{key}: {inner}")
        elif not isinstance(value, dict | list):
            parts.append(f"{key} {_plain(value)}")
        elif value:
            parts.append(f"{key}: {len(value)}")
    return "; ".join(parts)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
