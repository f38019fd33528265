# SPDX-License-Identifier: Apache-2.0
"""On what a run was measured: command, versions, machine, seed, as far as its settings say."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Any

from kvcomm_vllm.evaluation.report.content import Content
from kvcomm_vllm.evaluation.report.read import Run

UNKNOWN = "not recorded"


def command_of(run: Run) -> str:
    """The exact command line, or a note that it is not there."""
    command = run.settings.get("command")
    if isinstance(command, list):
        return shlex.join(str(part) for part in command)
    return str(command or UNKNOWN)


def facts(content: Content, run: Run) -> list[tuple[str, str]]:
    """(what, value) pairs; what the settings lack is said to be not recorded."""
    machine = _mapping(run.settings.get("machine"))
    versions = _mapping(run.settings.get("versions"))
    gpus = machine.get("gpus")
    memory = machine.get("memory_gib")
    return [
        ("Model", _text(run.setting("model"))),
        ("GPU", ", ".join(gpus) if gpus else "none" if "gpus" in machine else UNKNOWN),
        ("CPU", _join([_text(machine.get("cpu")), _unit(machine.get("cores"), "cores")])),
        ("Memory", _unit(memory, "GiB") or UNKNOWN),
        ("System", _text(machine.get("system"))),
        ("Versions", _join(f"{name} {value}" for name, value in versions.items()) or UNKNOWN),
        ("Seed", _text(run.setting("seed"))),
        ("Columns", ", ".join(content.columns)),
        ("Workloads", _workloads(content, run)),
    ]


def other_settings(run: Run) -> str:
    """The whole of run.json as text."""
    return json.dumps(run.settings, indent=1, ensure_ascii=False)


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


def _unit(value: Any, unit: str) -> str:
    return "" if value is None else f"{value} {unit}"


def _join(parts: Iterable[str | None]) -> str:
    return ", ".join(part for part in parts if part)
