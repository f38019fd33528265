# SPDX-License-Identifier: Apache-2.0
"""The report of `kvcomm bench`, made of the records in its folder and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from kvcomm_vllm.evaluation.report.content import compute
from kvcomm_vllm.evaluation.report.markdown import markdown
from kvcomm_vllm.evaluation.report.read import read_run
from kvcomm_vllm.evaluation.report.words import alarms
from kvcomm_vllm.evaluation.workloads.rows import DataError


def write_report(folder: Path) -> list[Path]:
    """Write report.json and report.md beside the records; return their paths.

    Equal records give equal files.

    Errors: DataError if the folder holds no records, or none of a whole task; OSError.
    """
    run = read_run(folder)
    if not run.tasks:
        raise DataError(f"{folder}: no task has ended yet, there is nothing to report")
    content = compute(run)
    numbers = {"alarms": alarms(content), "settings": run.settings, **asdict(content)}
    texts = {
        "report.json": json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": markdown(content, run),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]
