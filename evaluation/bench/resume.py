# SPDX-License-Identifier: Apache-2.0
"""run.json: what a run was made with, and whether another one may continue it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvcomm_vllm.cli.machine import describe_machine, describe_versions
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.evaluation.bench.columns import Endpoint, choose_columns
from kvcomm_vllm.evaluation.bench.options import Options
from kvcomm_vllm.evaluation.bench.plan import Study
from kvcomm_vllm.evaluation.bench.records import LOCKSTEP
from kvcomm_vllm.evaluation.workloads import workload
from kvcomm_vllm.evaluation.workloads.rows import DataError

RUN = "run.json"


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Settings of the run in a folder, None if there is none.

    Raises:
        DataError: there is something else.
    """
    path = folder / RUN
    if not path.exists():
        return None
    try:
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); choose another --out") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("options"), dict):
        raise DataError(f"{path} is not from kvcomm bench; choose another --out")
    return settings


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Whole or not at all."""
    draft = folder / f"{RUN}.draft"
    draft.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(folder / RUN)


def check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Whether a run may be continued by these options.

    Args:
        before, now: :meth:`Options.settings`.

    Raises:
        DataError: they differ; the message says in what.
    """
    # what is in the file has been through JSON
    now = json.loads(json.dumps(now))
    different = [
        f"{name}: {_short(before.get(name))} there, {_short(now.get(name))} here"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if different:
        raise DataError(
            f"{folder} holds a run with other options ({'; '.join(different)}). Use another --out, "
            f"or continue it with --resume --out {folder}"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def new_settings(options: Options, plan: list[Study]) -> dict[str, Any]:
    """run.json before anything was measured."""
    phases: dict[str, list[str]] = {}
    for study in plan:
        phases.setdefault(study.phase, []).append(study.workload)
    return {
        **about_run(options.model),
        "seed": options.seed,
        "options": options.settings(),
        "columns": {
            column.name: {name: vars(column)[name] for name in ("server", "hints", "cached")}
            for column in options.columns
        },
        "workloads": {
            study.workload: {
                "title": workload(study.workload).title,
                "metric": workload(study.workload).metric,
                "options": options.workloads[study.workload],
                "source": study.source,
                "tasks": len(study.units),
            }
            for study in plan
            if study.phase == LOCKSTEP
        },
        "phases": phases,
        "config": {"effective": options.config.to_mapping()},
        "servers": [],
        "sessions": [],
        "complete": False,
    }


def about_run(model: str) -> dict[str, Any]:
    """What every report says of how it came about."""
    return {
        "command": ["kvcomm", *sys.argv[1:]],
        "model": model,
        "sampling": {"temperature": 0.0, "seed": 0},
        "versions": describe_versions(),
        "machine": describe_machine(),
    }


def options_of(folder: Path) -> Options:
    """The options of the run in a folder.

    Raises:
        DataError: there is no run.
    """
    settings = read_settings(folder)
    if settings is None:
        raise DataError(f"{folder} has no {RUN}: there is no run to continue")
    given = dict(settings["options"])
    endpoints = {name: Endpoint(**value) for name, value in given["endpoints"].items()}
    changed = {
        "columns": choose_columns(given["columns"], endpoints),
        "endpoints": endpoints,
        "data": Path(given["data"]) if given["data"] else None,
        "config": KVCommConfig.from_mapping(given["config"], str(folder / RUN)),
    }
    return Options(out=folder, **{**given, **changed})
