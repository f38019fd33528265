# SPDX-License-Identifier: Apache-2.0
"""What run.json says of a run before it has begun."""

from __future__ import annotations

import sys
from typing import Any

from kvcomm_vllm.cli.bench.columns import Column
from kvcomm_vllm.cli.bench.options import Options
from kvcomm_vllm.cli.bench.plan import LOCKSTEP, Study
from kvcomm_vllm.cli.bench.workloads import workload
from kvcomm_vllm.cli.machine import describe_machine, describe_versions

Settings = dict[str, Any]


def new_settings(options: Options, plan: list[Study]) -> Settings:
    """run.json before anything was measured."""
    return {
        "command": ["kvcomm", *sys.argv[1:]],
        "model": options.model,
        "seed": options.seed,
        "options": options.settings(),
        "columns": {column.name: _column(column) for column in options.columns},
        "workloads": {
            study.workload: {
                **_workload(study.workload),
                "options": options.workloads.get(study.workload, options.stream_options),
                "source": study.source,
                "tasks": study.tasks,
            }
            for study in plan
            if study.phase == LOCKSTEP
        },
        "phases": {
            phase: [study.workload for study in plan if study.phase == phase]
            for phase in dict.fromkeys(study.phase for study in plan)
        },
        "sampling": {"temperature": 0.0, "seed": 0},
        "config": {"effective": options.config.to_mapping()},
        "versions": describe_versions(),
        "machine": describe_machine(),
        "servers": [],
        "sessions": [],
        "complete": False,
    }


def _column(column: Column) -> Settings:
    return {"server": column.server, "hints": column.hints, "cached": column.cached}


def _workload(name: str) -> Settings:
    return {"title": workload(name).title, "metric": workload(name).metric}
