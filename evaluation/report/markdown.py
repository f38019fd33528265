# SPDX-License-Identifier: Apache-2.0
"""The report of `kvcomm bench` as Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from kvcomm_vllm.evaluation.report.intervals import FEWEST_UNITS, RESAMPLES
from kvcomm_vllm.evaluation.report.report import Report
from kvcomm_vllm.evaluation.report.reuse import Allowance
from kvcomm_vllm.evaluation.report.run import Run
from kvcomm_vllm.evaluation.report.words import alarms, cards, unknown
from kvcomm_vllm.evaluation.workloads.rows import DATA

UNKNOWN = "not recorded"


def markdown(report: Report) -> str:
    """Alarms first, then sentences, conditions, tables, definitions, and what is not known."""
    run = report.run
    words = run.setting("command")
    command = shlex.join(words) if words else UNKNOWN
    blocks = [f"**{alarm}**" for alarm in alarms(report)]
    blocks += [
        "# kvcomm bench",
        *cards(report),
        f"```sh\n{command}\n```",
    ]
    blocks.append(_list(f"{name}: {value or UNKNOWN}" for name, value in _facts(run).items()))
    for table in report.tables.values():
        blocks += [f"## {table.title}", table.note, table.markdown()]
    blocks += ["## How it is counted", _definitions(run)]
    blocks += ["## Not measured", _list(unknown(report))]
    return "\n\n".join(blocks) + "\n"


def _definitions(run: Run) -> str:
    """Terms and how they are counted."""
    text = (DATA / "definitions.md").read_text(encoding="utf-8").strip()
    allowed = Allowance.of_run(run)
    rest = allowed.page - 1
    return text.format(resamples=RESAMPLES, fewest=FEWEST_UNITS, seam=allowed.seam, rest=rest)


def _facts(run: Run) -> dict[str, str | None]:
    """On what was measured; None where the settings do not say."""
    machine, versions = run.setting("machine") or {}, run.setting("versions") or {}
    gpus, cores, memory = (machine.get(name) for name in ("gpus", "cores", "memory_gib"))
    seed = run.setting("options", "seed")
    return {
        "Model": run.setting("options", "model"),
        "GPU": ", ".join(gpus) if gpus else "none" if "gpus" in machine else None,
        "CPU": f"{machine.get('cpu') or UNKNOWN}{f', {cores} cores' if cores else ''}",
        "Memory": f"{memory} GiB" if memory else None,
        "System": machine.get("system"),
        "Versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "Seed": None if seed is None else str(seed),
        "Columns": ", ".join(run.columns),
        "Workloads": ", ".join(_workload(run, name) for name in run.workloads()),
    }


def _workload(run: Run, name: str) -> str:
    tasks = len({task.task for task in run.tasks if task.workload == name})
    source = run.setting("workloads", name, "source")
    return f"{name} ({tasks} tasks{f', {source}' if source else ''})"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)
