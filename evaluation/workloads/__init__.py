# SPDX-License-Identifier: Apache-2.0
"""What agents are given to do, by name; a module each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from kvcomm_vllm.evaluation.workloads import (
    agents,
    coding,
    edits,
    groupchat,
    judge,
    math,
    mmlu,
    probes,
    rag,
    repo,
    synthetic,
    toolcalls,
)
from kvcomm_vllm.evaluation.workloads.case import Case
from kvcomm_vllm.evaluation.workloads.data_set import DataSet, chance
from kvcomm_vllm.evaluation.workloads.rows import DataError
from kvcomm_vllm.evaluation.workloads.task import MakeCases, Workload

_MODULES = (math, coding, rag, mmlu, groupchat, judge, toolcalls, synthetic, agents)
WORKLOADS: dict[str, Workload] = {
    one.name: one
    for one in (
        *(module.WORKLOAD for module in _MODULES),
        agents.CROWD,
        *edits.WORKLOADS,
        repo.WORKLOAD,
    )
}
# What `kvcomm fidelity` compares: cases alone, since dense answers are its scores.
CASES: dict[str, tuple[DataSet, MakeCases] | Workload] = {
    "gsm8k3": (math.DATA, partial(math.solve, agents=3)),
    "gsm8k5": (math.DATA, partial(math.solve, agents=5)),
    "groupchat": (groupchat.DATA, groupchat.discuss),
    "rag": (rag.DATA, rag.consult),
    "judge": (math.DATA, judge.compete),
    **{one.name: one for one in (*edits.WORKLOADS, repo.WORKLOAD)},
}
# The beginnings of one chain of agents.
CHAINS: dict[str, tuple[DataSet, MakeCases] | Workload] = {
    f"chain{agents}": (math.DATA, partial(math.chain_start, agents=agents))
    for agents in range(2, max(math.TEAMS) + 1)
}
# Their own table; see evaluation/fidelity/probes.py.
PROBES: dict[str, Workload] = {one.name: one for one in probes.WORKLOADS}
# of a workload without data, which has no end
MADE_UP_CASES = 128
Found = TypeVar("Found")


def _named(name: str, known: Mapping[str, Found]) -> Found:
    if name not in known:
        raise DataError(f"{name!r} is no workload; there are {', '.join(known)}")
    return known[name]


def workload(name: str) -> Workload:
    """A workload by its name.

    Raises:
        DataError: no such workload.
    """
    return _named(name, WORKLOADS)


def cases(name: str, folder: Path | None, seed: int) -> tuple[list[Case], str]:
    """All cases in the order of the data, and where those are from; the same for one seed.

    Raises:
        DataError: no such workload, unreadable or malformed data.
    """
    found = _named(name, {**CASES, **CHAINS, **PROBES})
    if isinstance(found, Workload):
        made = found.make(folder, seed)
        return [task.case for task in made.tasks[:MADE_UP_CASES]], made.source
    data, make = found
    rows, source = data.rows(folder)
    return [case for row in rows for case in make(row, chance(row, seed))], source
