# SPDX-License-Identifier: Apache-2.0
"""The report of `kvcomm bench`, made of the records in its folder and nothing else."""

from __future__ import annotations

from pathlib import Path

from kvcomm_vllm.evaluation.report.markdown import markdown
from kvcomm_vllm.evaluation.report.report import make_report
from kvcomm_vllm.evaluation.report.run import read_run
from kvcomm_vllm.evaluation.report.table import write_json
from kvcomm_vllm.evaluation.report.words import alarms
from kvcomm_vllm.evaluation.workloads.rows import DataError


def write_report(folder: Path) -> list[Path]:
    """Write report.json and report.md beside the records; return their paths.

    Equal records give equal files.

    Raises:
        DataError: the folder holds no records, or none of a whole task.
    """
    run = read_run(folder)
    if not run.tasks:
        raise DataError(f"{folder}: no task has ended yet, there is nothing to report")
    report = make_report(run)
    numbers, text = folder / "report.json", folder / "report.md"
    tables = {title: table.rows for title, table in report.tables.items()}
    write_json(numbers, {"alarms": alarms(report), "settings": run.settings, "tables": tables})
    text.write_text(markdown(report), encoding="utf-8")
    return [numbers, text]
