# SPDX-License-Identifier: Apache-2.0
"""Built-in workloads by name, and the cases they make."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvcomm_vllm.cli.fidelity.case import Case
from kvcomm_vllm.cli.fidelity.source import Row, data_file, read_file, read_sample
from kvcomm_vllm.cli.fidelity.workloads import groupchat, gsm8k, judge, rag
from kvcomm_vllm.cli.questions import DataError

Make = Callable[[Row, random.Random], list[Case]]


def _as_it_is(row: Row) -> list[Row]:
    return [row]


@dataclass(frozen=True)
class Workload:
    """How rows of a data file become cases.

    Args:
        file: name in the data folder; ``fields``: what its rows must have.
        sample: packaged file; ``expand`` makes rows as in ``file`` of each of its lines.
    """

    file: str
    fields: dict[str, type]
    make: Make
    sample: str
    sample_fields: dict[str, type]
    expand: Callable[[Row], list[Row]] = field(default=_as_it_is)

    def cases(self, folder: Path | None, seed: int) -> tuple[list[Case], str]:
        """All cases in the order of the data, and where those are from; the same for one seed.

        Raises:
            DataError: unreadable or malformed data.
        """
        if (path := data_file(self.file, folder)) is not None:
            rows, source = read_file(path, self.fields), path.name
        else:
            lines = read_sample(self.sample, self.sample_fields)
            rows, source = [row for line in lines for row in self.expand(line)], "packaged sample"
        # A generator per row: its cases stay the same whatever the rows before it.
        chances = (random.Random(f"{seed} {row['id']}") for row in rows)
        found = [self.make(row, rng) for row, rng in zip(rows, chances, strict=True)]
        return [case for cases in found for case in cases], source


_QUESTION: dict[str, type] = {"question": str}
_PROBLEMS = ("gsm8k.jsonl", _QUESTION)
_OUR_PROBLEMS = ("word_problems.jsonl", _QUESTION)

WORKLOADS: dict[str, Workload] = {
    "gsm8k3": Workload(*_PROBLEMS, gsm8k.three, *_OUR_PROBLEMS),
    "gsm8k5": Workload(*_PROBLEMS, gsm8k.five, *_OUR_PROBLEMS),
    "groupchat": Workload(
        "chat_meetings.jsonl",
        {"turns": list, "query": str},
        groupchat.make,
        "chats.jsonl",
        {"turns": list, "queries": list},
        groupchat.expand,
    ),
    "rag": Workload(
        "rag_squad.jsonl",
        {"question": str, "passages": list},
        rag.make,
        "passages.jsonl",
        {"questions": list, "passages": list},
        rag.expand,
    ),
    "judge": Workload(*_PROBLEMS, judge.make, *_OUR_PROBLEMS),
}


def workload(name: str) -> Workload:
    """
    Raises:
        DataError: no such workload.
    """
    if name not in WORKLOADS:
        raise DataError(f"{name!r} is no workload; there are {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
