# SPDX-License-Identifier: Apache-2.0
"""The report of `kvcomm bench` as Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from kvcomm_vllm.evaluation.report.content import Content
from kvcomm_vllm.evaluation.report.intervals import FEWEST_UNITS, RESAMPLES
from kvcomm_vllm.evaluation.report.read import Run
from kvcomm_vllm.evaluation.report.tables import all_tables
from kvcomm_vllm.evaluation.report.words import alarms, cards, unknown
from kvcomm_vllm.evaluation.workloads.rows import DATA

UNKNOWN = "not recorded"


def markdown(content: Content, run: Run) -> str:
    """Alarms first, then sentences, conditions, tables, definitions, and what is not known."""
    blocks = [f"**{alarm}**" for alarm in alarms(content)]
    blocks += ["# kvcomm bench", *cards(content), f"```sh\n{_command(run)}\n```"]
    blocks.append(_list(f"{name}: {value}" for name, value in _facts(content, run).items()))
    for table in all_tables(content):
        blocks += [f"## {table.title}", table.note, table.markdown()]
    blocks += ["## How it is counted", _definitions(content)]
    blocks += ["## Not measured", _list(unknown(content, run))]
    return "\n\n".join(blocks) + "\n"


def _definitions(content: Content) -> str:
    """Terms and how they are counted."""
    text = (DATA / "definitions.md").read_text(encoding="utf-8").strip()
    allowed = content.allowance
    rest = allowed.page - 1
    return text.format(resamples=RESAMPLES, fewest=FEWEST_UNITS, seam=allowed.seam, rest=rest)


def _command(run: Run) -> str:
    """The exact command line, or a note that it is not there."""
    command = run.settings.get("command")
    if isinstance(command, list):
        return shlex.join(str(part) for part in command)
    return str(command or UNKNOWN)


def _facts(content: Content, run: Run) -> dict[str, str]:
    """On what was measured; what the settings lack is said to be not recorded."""
    machine = _mapping(run.settings.get("machine"))
    versions = _mapping(run.settings.get("versions"))
    gpus, cpu_cores, memory = (machine.get(name) for name in ("gpus", "cores", "memory_gib"))
    return {
        "Model": _text(run.setting("model")),
        "GPU": ", ".join(gpus) if gpus else "none" if "gpus" in machine else UNKNOWN,
        "CPU": _join([_text(machine.get("cpu")), f"{cpu_cores} cores" if cpu_cores else None]),
        "Memory": f"{memory} GiB" if memory else UNKNOWN,
        "System": _text(machine.get("system")),
        "Versions": _join(f"{name} {value}" for name, value in versions.items()) or UNKNOWN,
        "Seed": _text(run.setting("seed")),
        "Columns": ", ".join(content.columns),
        "Workloads": _workloads(content, run),
    }


def _workloads(content: Content, run: Run) -> str:
    known = _mapping(run.settings.get("workloads"))
    described = []
    for name in content.workloads:
        source = _mapping(known.get(name)).get("source")
        tasks = len({task.task for task in run.tasks if task.workload == name})
        described.append(f"{name} ({_join([f'{tasks} tasks', source])})")
    return ", ".join(described)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return UNKNOWN if value is None else str(value)


def _join(parts: Iterable[str | None]) -> str:
    return ", ".join(part for part in parts if part)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)
