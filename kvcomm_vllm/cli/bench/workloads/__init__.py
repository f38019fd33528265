# SPDX-License-Identifier: Apache-2.0
"""What `kvcomm bench` can run, by name; a module each."""

from __future__ import annotations

from kvcomm_vllm.cli.bench.task import Workload
from kvcomm_vllm.cli.bench.workloads import (
    coding,
    groupchat,
    judge,
    math,
    mmlu,
    rag,
    synthetic,
    toolcalls,
)
from kvcomm_vllm.cli.fidelity.source import named

_MODULES = (math, coding, rag, mmlu, groupchat, judge, toolcalls, synthetic)
WORKLOADS: dict[str, Workload] = {module.WORKLOAD.name: module.WORKLOAD for module in _MODULES}


def workload(name: str) -> Workload:
    """
    Raises:
        DataError: no such workload.
    """
    return named(name, WORKLOADS)
