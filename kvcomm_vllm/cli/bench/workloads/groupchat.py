# SPDX-License-Identifier: Apache-2.0
"""Speakers with different instructions over one growing transcript, then a question about it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from kvcomm_vllm.cli.bench.scoring import word_f1
from kvcomm_vllm.cli.bench.task import Task, TaskSet, Workload
from kvcomm_vllm.cli.bench.workloads.rows import chance
from kvcomm_vllm.cli.bench.workloads.script import task_of, task_set
from kvcomm_vllm.cli.fidelity.workloads import groupchat
from kvcomm_vllm.cli.rows import Row

# Who an agent is must not change from meeting to meeting: its instructions are what a server has
# seen before. The name stands at the end of the prompt.
CALLED = "the one whose turn it is"


def make(folder: Path | None = None, seed: int = 0, output_tokens: int = 96) -> TaskSet:
    """
    Args:
        output_tokens: longest answer of each speaker.

    Raises:
        DataError: an option out of its range; unusable data.
    """

    def task(row: Row) -> Task:
        (case,) = groupchat.make(excerpt := _excerpt(row), chance(row, seed), CALLED)
        answer = excerpt.get("answer")
        score = partial(word_f1, accepted=[answer]) if answer else None
        speakers = [f"Speaker {number}" for number in range(1, len(case.turns))]
        return task_of(case, [*speakers, "Clerk"], output_tokens, score)

    return task_set(groupchat.DATA, folder, seed, output_tokens, task)


def _excerpt(row: Row) -> Row:
    """The row cut to a part of the meeting that a query can be answered from, with that query; the
    row without an answer where no query's evidence fits.

    Rows may have ``evidence``, the first and last turn that the answer rests on, and ``queries``,
    of which each has its own.
    """
    for query in row.get("queries", [row]):
        if "evidence" not in query:
            continue
        first, last = query["evidence"]
        start, room = last + 1, groupchat.MOST_CHARACTERS
        while start > 0 and (room := room - len(row["turns"][start - 1]["text"])) >= 0:
            start -= 1
        if start <= first:
            found = {"query": query["query"], "answer": query["answer"]}
            return row | found | {"turns": row["turns"][start:]}
    return row | {"answer": None} if "evidence" in row else row


WORKLOAD = Workload(
    name="groupchat",
    title="Three speakers go on with a meeting, one after the other, and a clerk is asked about it",
    make=make,
    calls=4,
    metric="word F1",
    options=("output_tokens",),
)
