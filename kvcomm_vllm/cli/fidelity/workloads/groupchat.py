# SPDX-License-Identifier: Apache-2.0
"""Speakers with different instructions over one transcript that grows between their turns."""

import itertools
import random
from collections import Counter

from kvcomm_vllm.cli.fidelity.case import Case, Turn, literal
from kvcomm_vllm.cli.fidelity.source import DataSet
from kvcomm_vllm.cli.rows import Row

SPEAKERS = (
    "You are {name}, one of the people in this meeting. You care about what is practical: who does "
    "it, with what, and by when. Speak in one or two sentences.",
    "In the meeting below you are {name}. You have seen plans fail before, and you ask what nobody "
    "has asked yet. Be brief and polite.",
    "Take the part of {name}. You try to bring the others together: name what they agree on and "
    "propose the next step, in two sentences at most.",
)
CLERK = (
    "You keep the minutes. People who were not there ask you what was said, and you answer from "
    "the transcript alone, in two or three sentences."
)
MOST_CHARACTERS = 6000  # about 1,500 tokens: the models this is run on have short contexts


def make(row: Row, rng: random.Random, called: str | None = None) -> list[Case]:
    """Up to three of those who speak most, in a random order, then the clerk, who is scored.

    Args:
        called: what all instructions call the speaker; None = by name.
    """
    turns = _first(row["turns"])
    talk: Counter[str] = Counter()
    for turn in turns:
        talk[str(turn["speaker"])] += len(turn["text"])
    names = [name for name, _ in talk.most_common(len(SPEAKERS))]
    rng.shuffle(names)
    # one part before each speaker; the last one is for the clerk alone
    cuts = [len(turns) * n // (len(names) + 1) for n in range(len(names) + 2)]
    parts = [_lines(turns[start:end]) for start, end in itertools.pairwise(cuts)]
    transcript, agents = "Transcript:\n\n", []
    for number, (name, part) in enumerate(zip(names, parts, strict=False), 1):
        transcript += part
        ask = f"\nIt is your turn, {literal(name)}. What do you say?"
        agents.append(Turn(SPEAKERS[number - 1].format(name=called or name), transcript + ask))
        transcript += f"{literal(name)}: {{{number}}}\n"
    transcript += parts[-1]
    agents.append(Turn(CLERK, f"{transcript}\nA question from outside: {literal(row['query'])}"))
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


DATA = DataSet(
    "chat_meetings.jsonl",
    {"turns": list, "query": str},
    "chats.jsonl",
    {"turns": list, "queries": list},
    expand,
)
