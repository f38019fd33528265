# SPDX-License-Identifier: Apache-2.0
"""Who is asked in each workload: names, instructions, and what to do."""

from __future__ import annotations

from functools import cache

import yaml

from kvcomm_vllm.evaluation.workloads.case import Role
from kvcomm_vllm.evaluation.workloads.rows import DATA


@cache
def roles(team: str) -> dict[str, Role]:
    """The members of a packaged team, in their order, by their names or, where two have one name,
    by an id.
    """
    teams = yaml.safe_load((DATA / "teams.yaml").read_text(encoding="utf-8"))
    return {
        row.get("id", row["name"]): (row["name"], row["system"], row.get("task", ""))
        for row in teams[team]
    }
