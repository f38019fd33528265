# SPDX-License-Identifier: Apache-2.0
"""Speakers with different instructions over one growing transcript, then a question about it."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial
from random import Random

from kvcomm_vllm.evaluation.workloads.case import Case, Turn, literal
from kvcomm_vllm.evaluation.workloads.data_set import DataSet
from kvcomm_vllm.evaluation.workloads.rows import Row
from kvcomm_vllm.evaluation.workloads.scoring import word_f1
from kvcomm_vllm.evaluation.workloads.task import Task, Workload
from kvcomm_vllm.evaluation.workloads.teams import roles

MOST_CHARACTERS = 6000  # about 1,500 tokens: the models this is run on have short contexts
# Who an agent is must not change from meeting to meeting where times are compared: its
# instructions are what a server has seen before. The name stands at the end of the prompt.
CALLED = "the one whose turn it is"


def discuss(row: Row, rng: Random, called: str | None = None) -> list[Case]:
    """Up to three of those who speak most, in a random order, then the clerk, who is scored.

    Args:
        called: what all instructions call the speaker; None = by name.
    """
    turns = _first(row["turns"])
    talk: Counter[str] = Counter()
    for turn in turns:
        talk[str(turn["speaker"])] += len(turn["text"])
    names = [name for name, _ in talk.most_common(len(roles("groupchat")) - 1)]
    rng.shuffle(names)
    # one part before each speaker; the last one is for the clerk alone
    cuts = [len(turns) * n // (len(names) + 1) for n in range(len(names) + 2)]
    parts = [_lines(turns[start:end]) for start, end in itertools.pairwise(cuts)]
    transcript, agents = "Transcript:\n\n", []
    for number, (name, part) in enumerate(zip(names, parts, strict=False), 1):
        transcript += part
        ask = f"\nIt is your turn, {literal(name)}. What do you say?"
        speaker, system, _ = roles("groupchat")[f"Speaker {number}"]
        agents.append(Turn(system.format(name=called or name), transcript + ask, speaker))
        transcript += f"{literal(name)}: {{{number}}}\n"
    query = f"\nA question from outside: {literal(row['query'])}"
    clerk, system, _ = roles("groupchat")["Clerk"]
    agents.append(Turn(system, transcript + parts[-1] + query, clerk))
    name = str(row["id"])
    return [Case(name, tuple(agents), group=name)]


def _first(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns from the start that fit, one at least."""
    room = MOST_CHARACTERS
    kept: list[dict[str, str]] = []
    for turn in turns:
        room -= len(turn["text"])
        if room < 0 and kept:
            break
        kept.append(turn)
    return kept


def _lines(turns: list[dict[str, str]]) -> str:
    return "".join(f"{literal(turn['speaker'])}: {literal(turn['text'])}\n" for turn in turns)


def expand(line: Row) -> list[Row]:
    """A row per question about a packaged transcript, whose turns are ``[speaker, text]``, and
    whose queries are ``[question, answer]``.
    """
    turns = [{"speaker": speaker, "text": text} for speaker, text in line["turns"]]
    return [
        {"id": f"{line['id']}-{number}", "turns": turns, "query": query, "answer": answer}
        for number, (query, answer) in enumerate(line["queries"])
    ]


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
        start, room = last + 1, MOST_CHARACTERS
        while start > 0 and (room := room - len(row["turns"][start - 1]["text"])) >= 0:
            start -= 1
        if start <= first:
            found = {"query": query["query"], "answer": query["answer"]}
            return row | found | {"turns": row["turns"][start:]}
    return row | {"answer": None} if "evidence" in row else row


def _tasks(row: Row, rng: Random, output_tokens: int = 96) -> list[Task]:
    excerpt = _excerpt(row)
    answer = excerpt.get("answer")
    score = partial(word_f1, accepted=[answer]) if answer else None
    return [Task(case, output_tokens, score) for case in discuss(excerpt, rng, CALLED)]


DATA = DataSet(
    "chat_meetings.jsonl",
    {"turns": list, "query": str},
    "chats.jsonl",
    {"turns": list, "queries": list},
    expand,
)
WORKLOAD = Workload(
    name="groupchat",
    title="Three speakers go on with a meeting, one after the other, and a clerk is asked about it",
    tasks=_tasks,
    data=DATA,
    metric="word F1",
)
