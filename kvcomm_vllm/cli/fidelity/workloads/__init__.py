# SPDX-License-Identifier: Apache-2.0
"""Built-in workloads by name, and the cases they make."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvcomm_vllm.cli.fidelity.case import Case
from kvcomm_vllm.cli.fidelity.source import DataSet, named
from kvcomm_vllm.cli.fidelity.workloads import groupchat, gsm8k, judge, rag
from kvcomm_vllm.cli.rows import Row

Make = Callable[[Row, random.Random], list[Case]]


@dataclass(frozen=True)
class Workload:
    """How the rows of a data set become cases."""

    data: DataSet
    make: Make

    def cases(self, folder: Path | None, seed: int) -> tuple[list[Case], str]:
        """All cases in the order of the data, and where those are from; the same for one seed.

        Raises:
            DataError: unreadable or malformed data.
        """
        rows, source = self.data.rows(folder)
        # A generator per row: its cases stay the same whatever the rows before it.
        chances = (random.Random(f"{seed} {row['id']}") for row in rows)
        found = [self.make(row, rng) for row, rng in zip(rows, chances, strict=True)]
        return [case for cases in found for case in cases], source


WORKLOADS: dict[str, Workload] = {
    "gsm8k3": Workload(gsm8k.DATA, gsm8k.three),
    "gsm8k5": Workload(gsm8k.DATA, gsm8k.five),
    "groupchat": Workload(groupchat.DATA, groupchat.make),
    "rag": Workload(rag.DATA, rag.make),
    "judge": Workload(gsm8k.DATA, judge.make),
}


def workload(name: str) -> Workload:
    """
    Raises:
        DataError: no such workload.
    """
    return named(name, WORKLOADS)
